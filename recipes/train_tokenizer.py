"""Trains the tokenizer on the prepared pretraining shards.

    python -m recipes.train_tokenizer --config recipes/configs/demo/tokenizer.yaml

The stage also reports how many bytes one token covers on text it was not trained on. A larger vocabulary covers more,
but its embedding and head cost parameters: 32768 suits models from depth 12 on, a few thousand the toys below.
"""

from dataclasses import dataclass, field
from itertools import islice, takewhile

from trl import TrlParser

from modeling_nanochat.tokenization_nanochat_gpt import token_bytes
from recipes.stage import Stage
from training.documents import open_documents, stream_documents
from training.tokenizer_training import MAX_CHARACTERS, MAX_DOCUMENT_CHARACTERS, BulkEncoder, train_tokenizer

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
    (arguments,) = TrlParser(TokenizerArguments).parse_args_and_config()
    stage = Stage("tokenizer", arguments.output_dir, [arguments], [arguments.data], arguments.rerun)
    if stage.is_done():
        return
    source = open_documents(arguments.data, arguments.text_column)
    stage.announce(vocabulary=arguments.vocab_size, max_characters=arguments.max_characters)
    one_epoch = takewhile(lambda item: item[1].epoch == 0, stream_documents(source, "train"))
    tokenizer = train_tokenizer(
        (text for text, _ in one_epoch),
        arguments.vocab_size,
        max_characters=arguments.max_characters,
        max_document_characters=arguments.max_document_characters,
        model_max_length=arguments.model_max_length,
    )
    tokenizer.save_pretrained(arguments.output_dir)
    encode, lengths = BulkEncoder(tokenizer), token_bytes(tokenizer)
    counts = [
        (len(ids) - 1, sum(lengths[index] for index in ids.tolist()))
        for ids in (encode(text) for text, _ in islice(stream_documents(source, "validation"), VALIDATION_DOCUMENTS))
    ]
    tokens, size = map(sum, zip(*counts))
    stage.finish({"vocabulary": len(tokenizer), "bytes_per_token": size / tokens, "documents_measured": len(counts)})


if __name__ == "__main__":
    main()
