"""The engine's counts and the responses sent, in Prometheus' text format (version 0.0.4)."""

from modeling_nanochat.recipes.serving.engine import Engine


def metrics_text(engine: Engine, responses: dict[tuple[str, int], int]) -> str:
    """Responses are counted by (path, status)."""
    counts = engine.counts
    figures = [
        ("rows_running", "gauge", "Answers being decoded.", engine.running),
        ("rows_max", "gauge", "Answers that can be decoded at the same time.", engine.max_rows),
        ("requests_waiting", "gauge", "Requests that wait for a row.", engine.waiting),
        ("requests_total", "counter", "Requests whose prompts have been read.", counts.requests),
        ("requests_cancelled_total", "counter", "Requests whose client left or had enough.", counts.cancelled),
        ("requests_failed_total", "counter", "Requests that the engine could not finish.", counts.failed),
        ("waiting_seconds_total", "counter", "Time that requests waited to be read.", counts.waiting_seconds),
        ("prompt_tokens_total", "counter", "Tokens of prompts read.", counts.prompt_tokens),
        ("generated_tokens_total", "counter", "Tokens of answers.", counts.generated_tokens),
        ("steps_total", "counter", "Steps of the batch.", counts.steps),
    ]
    lines = []
    for name, kind, purpose, value in figures:
        lines += [f"# HELP nanochat_{name} {purpose}", f"# TYPE nanochat_{name} {kind}", f"nanochat_{name} {value}"]
    lines += [
        "# HELP nanochat_responses_total Responses by path and status.",
        "# TYPE nanochat_responses_total counter",
    ]
    for (path, status), count in sorted(responses.items()):
        lines.append(f'nanochat_responses_total{{path="{path}",status="{status}"}} {count}')
    return "\n".join(lines) + "\n"
