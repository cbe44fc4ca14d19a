"""The tokenizer of a checkpoint, and whether the model has an embedding for each of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from entropy_probe.checkpoints.adapters import find_base, read_adapter_config
from entropy_probe.checkpoints.directory import adapters_of
from entropy_probe.checkpoints.errors import DamagedFileError, MismatchError
from entropy_probe.checkpoints.formats import home_of
from entropy_probe.checkpoints.libraries import one_line_errors
from entropy_probe.checkpoints.safe_read import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_directories(path: Path, base: str | Path | None) -> list[str]:
    """Where a tokenizer may be, in order: the checkpoint, then the base model; hub names count, empty places do not."""
    names = [str(path), *([str(base)] if base else [])]
    return [name for name in names if not Path(name).is_dir() or (Path(name) / "tokenizer_config.json").is_file()]


def load_tokenizer(path: Path, base: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint, else of the base model; None when neither directory has one."""
    for name in tokenizer_directories(path, base):
        with one_line_errors(f"{name}: tokenizer"):
            return _tokenizer_class(Path(name) / "tokenizer_config.json").from_pretrained(name, trust_remote_code=False)
    return None


def tokenizer_of(path: Path, base_model: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a checkpoint is loaded with, before anything else of it is read."""
    home, base = path, base_model
    if base_model is None:
        home, adapters = home_of(path), adapters_of(path)
        if adapters:
            place = next(iter(adapters.values()))
            base = find_base(path, place, None, read_adapter_config(place).get("base_model_name_or_path"))
    return load_tokenizer(home, base)


def _tokenizer_class(config: Path) -> Any:
    """The class a tokenizer was saved from.

    ``AutoTokenizer`` goes by the ``model_type`` of a ``config.json`` in the same directory: it opened a generic
    tokenizer beside a Qwen2 model as Qwen2's, which splits the same text into other tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    if config.is_file() and read_json(config).get("tokenizer_class") in generic:
        return PreTrainedTokenizerFast
    return AutoTokenizer


def check_vocabulary(path: Path, base: str | Path | None, model: nn.Module) -> None:
    """Check that every token of ``tokenizer.json`` has a row in the embedding; only the file is read."""
    file = next((Path(name) / "tokenizer.json" for name in tokenizer_directories(path, base)), None)
    if file is None or not file.is_file():
        return
    largest = _largest_token_id(file)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if largest >= rows:
        raise MismatchError(
            f"{file}: expected token ids below the {rows} rows of the embedding, got {largest}; the vocabulary was "
            "resized after one of the two was saved, pass the model and tokenizer that belong together"
        )


def _largest_token_id(file: Path) -> int:
    content = read_json(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = []
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        ids.append(len(vocabulary) - 1)
    added = content.get("added_tokens")
    ids += [token.get("id") if isinstance(token, dict) else token for token in added] if isinstance(added, list) else []
    if not all(type(i) is int for i in ids):
        raise DamagedFileError(f"{file}: expected whole numbers as token ids, got something else; copy it again")
    return max(ids, default=-1)
