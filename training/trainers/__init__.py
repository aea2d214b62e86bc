"""The trainers: subclasses of Transformers' and TRL's own, which keep devices, accumulation, logging and trackers.

Where a public hook does, it is used. These private ones of the libraries are replaced, as nothing public reaches there;
a test compares this list with the classes and the installed libraries, because a hook that a new version no longer
calls fails in silence.

- `_save_checkpoint`: a checkpoint appears whole or not at all, with the optimizer's share of every rank.
- `_load_optimizer_and_scheduler`: resuming on any number of ranks, with the rates that the settings have now.
- `_get_grad_norm`: not computed; without clipping the Trainer computes it all the same.
- `_get_train_sampler`: SFT's rows of an epoch, whole batches only. `get_train_dataloader` would be the public way, and
  means writing the Trainer's loader again.
- `_prepare_dataset`: preferences come rendered, and TRL's DPO has no `skip_prepare_dataset`, which SFT takes.
- `_generate_and_score_completions`, `_calculate_rewards`: reinforcement draws its samples from its own seeds, with the
  calculator, and has rewarded them before TRL asks.
- `_compute_loss`: the loss of REINFORCE in the eight lines that it is.

`_save_rng_state`, `_load_from_checkpoint` and, under FSDP, `_save_optimizer_and_scheduler` are called as they are.
"""
