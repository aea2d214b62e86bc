"""Trains the tokenizer on the prepared pretraining shards.

    nanochat train_tokenizer --config recipes/configs/demo/tokenizer.yaml

The stage also reports how many bytes one token covers on text it was not trained on. A larger vocabulary covers more,
but its embedding and head cost parameters: 32768 suits models from depth 12 on, a few thousand the toys below.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.training.data.documents import open_documents, stream_documents
from modeling_nanochat.training.tokenizer import MAX_CHARACTERS, MAX_DOCUMENT_CHARACTERS, BulkEncoder, train_tokenizer
from modeling_nanochat.training.whole_files import replace_files

VALIDATION_DOCUMENTS = 1000


@dataclass
class TokenizerArguments:
    """What the tokenizer is trained on, how large it is, and where it goes."""

    data: str = field(
        default="out/demo/data/pretrain", metadata={"help": "Parquet shards: folder, glob, or a data set on the Hub."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds a document."})
    output_dir: str = field(default="out/demo/tokenizer", metadata={"help": "Folder the tokenizer is saved to."})
    rerun: bool = field(default=False, metadata={"help": "Train again even if it is already there."})
    vocab_size: int = field(default=32768, metadata={"help": "Tokens, the nine special ones included; n x 64."})
    max_characters: int = field(default=MAX_CHARACTERS, metadata={"help": "Characters of text to learn from at most."})
    max_document_characters: int = field(
        default=MAX_DOCUMENT_CHARACTERS, metadata={"help": "Characters taken of one document at most."}
    )
    model_max_length: int = field(default=2048, metadata={"help": "Context length noted in the tokenizer's files."})


def main() -> None:
    (arguments,) = parse(TokenizerArguments)
    train(arguments)


def train(arguments: TokenizerArguments) -> None:
    """Learn and save the tokenizer, unless that is done."""
    stage = Stage("tokenizer", arguments.output_dir, [arguments], [arguments.data], arguments.rerun)
    if stage.is_done():
        return
    source = open_documents(arguments.data, arguments.text_column)
    stage.announce(vocabulary=arguments.vocab_size, max_characters=arguments.max_characters)
    one_epoch = takewhile(lambda item: item[1].epoch == 0, stream_documents(source, "train"))
    tokenizer = train_tokenizer(
        tqdm((text for text, _ in one_epoch), desc="tokenizer", unit="document", disable=None),
        arguments.vocab_size,
        max_characters=arguments.max_characters,
        max_document_characters=arguments.max_document_characters,
        model_max_length=arguments.model_max_length,
    )
    replace_files(arguments.output_dir, tokenizer.save_pretrained)
    validation = [text for text, _ in islice(stream_documents(source, "validation"), VALIDATION_DOCUMENTS)]
    stage.finish({"vocabulary": len(tokenizer), "bytes_per_token": bytes_per_token(tokenizer, validation)})


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """How much text a token covers on average."""
    encode = BulkEncoder(tokenizer)
    tokens = sum(len(encode(text)) - 1 for text in texts)  # BOS covers nothing
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


if __name__ == "__main__":
    run(main)
