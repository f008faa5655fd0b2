"""Finds the files of a model: local folder, GGUF file, Hugging Face id, or demo.

Called by the engine and by `octavo plan`. Never reads weights; what it returns says which source
`loader` opens, and identifies the weights for the prefix cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants

from octavo.errors import ConfigError, ModelNotFoundError
from octavo.weights.checkpoint import read_json, weight_files
from octavo.weights.demo import DEMO_NAMES, demo_path
from octavo.weights.gguf_config import config_of, generation_config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.modules import MODULES_FILE, module_files, read_modules
from octavo.weights.quantization import Quantization, read_quantization

ModelKind = Literal["safetensors", "gguf", "config"]

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "*.txt")
_WEIGHTS = "*.safetensors"
_DUPLICATES = ("consolidated*", "*/*")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.ENOENT)
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)")
_HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)/(?P<file>.+\.gguf)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model that was found. Made by `resolve_model`."""

    name: str
    """As the user wrote it."""
    kind: ModelKind
    """`config`: there are no weights, dummy ones are made."""
    path: Path
    """The folder (safetensors, config) or the file (gguf)."""
    config: dict[str, Any]
    generation_config: dict[str, Any]
    identity: str
    """Hex digest that changes with the weights: root of the prefix cache's keys."""
    modules: list[dict[str, Any]] = field(default_factory=list)
    """What follows the model (`weights.modules`)."""

    @property
    def quantization(self) -> Quantization | None:
        """How the checkpoint is quantised; GGUF files say it of each tensor. Raises
        UnsupportedModelError."""
        return read_quantization(self.config, self.path) if self.path.is_dir() else None


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> ModelFiles:
    """Returns where the model is, downloading or making it first where needed.

    `load_format` is one of config.LOAD_FORMATS; `dummy` needs no weights files, and `seed` then is
    part of the identity. Raises ModelNotFoundError saying what was tried, UnsupportedModelError for
    formats that are not known, ModelError for a broken config.
    """
    path = demo_path(model) if model in DEMO_NAMES else Path(model).expanduser()
    if not path.exists():
        path = _download(model, revision, download_dir, load_format)
    files = _from_folder(model, path, load_format) if path.is_dir() else _from_gguf(model, path)
    if load_format == "dummy":
        identity = _digest((json.dumps(files.config, sort_keys=True), f"dummy {seed}"))
        return replace(files, kind="config", identity=identity)
    if load_format not in ("auto", files.kind):
        raise ModelNotFoundError(
            f"{model} holds {files.kind} weights and load_format is {load_format!r}; use auto"
        )
    return files


def resolve_tokenizer(tokenizer: str, download_dir: str | None = None) -> Path:
    """Returns the folder or file that a tokenizer is read from: given as models are, without their
    weights. Raises ModelNotFoundError."""
    path = demo_path(tokenizer) if tokenizer in DEMO_NAMES else Path(tokenizer).expanduser()
    if path.exists():
        return path
    try:
        return _download(tokenizer, None, download_dir, "dummy", needed="tokenizer.json")
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"tokenizer: {error}") from error


def _from_folder(model: str, folder: Path, load_format: str) -> ModelFiles:
    ggufs = sorted(folder.glob("*.gguf"))
    if load_format == "gguf" or (ggufs and not (folder / "config.json").exists()):
        firsts = [p for p in ggufs if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", p.name)]
        if len(firsts) == 1:
            return _from_gguf(model, firsts[0])
        names = ", ".join(path.name for path in firsts) or "none"
        raise ModelNotFoundError(
            f"{folder} must hold one GGUF model, it has {names}; give the path of the file"
        )
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelNotFoundError(f"{folder} has no config.json and no .gguf file")
    read_quantization(config, folder)  # what cannot be read is refused at once
    weights = weight_files(folder) if load_format != "dummy" else ()
    if load_format != "dummy" and not weights:
        others = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
        has = f"only {others[0]}, which is not read" if others else "no weights"
        raise ModelNotFoundError(
            f"{folder} has {has}: *.safetensors or *.gguf are; use --load-format dummy for random "
            "weights"
        )
    return ModelFiles(
        name=model,
        kind="safetensors",
        path=folder,
        config=config,
        generation_config=_generation_config(folder, config),
        identity=_digest((json.dumps(config, sort_keys=True), *_stamps(weights))),
        modules=read_modules(folder),
    )


def _generation_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns generation_config.json; the ids that end a sequence are from config.json (or what of
    it is the language model's) where that file does not name them."""
    found = read_json(folder / "generation_config.json") or {}
    if "eos_token_id" in found:
        return found
    text_config = config.get("text_config")
    for fields in (config, text_config if isinstance(text_config, dict) else {}):
        if fields.get("eos_token_id") is not None:
            return found | {"eos_token_id": fields["eos_token_id"]}
    return found


def _from_gguf(model: str, path: Path) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ModelNotFoundError(f"{path} is neither a folder nor a .gguf file")
    file = read_gguf(path)
    config = config_of(file)
    return ModelFiles(
        name=model,
        kind="gguf",
        path=path,
        config=config,
        generation_config=generation_config_of(file),
        identity=_digest((json.dumps(config, sort_keys=True), *_stamps(file.paths))),
    )


def _stamps(paths: Iterable[Path]) -> list[str]:
    """Returns what tells whether files changed, without reading gigabytes."""
    stats = [(path.name, path.stat()) for path in paths]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hub_errors() -> tuple[type[BaseException], ...]:
    """Returns the hub's errors, and those of its HTTP library, which has changed twice:
    HfHubHTTPError derives from the base class of the one that is used."""
    from huggingface_hub.errors import HfHubHTTPError  # brings that library along

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether no answer came: the hub wraps the connection's error, if anything, in one of its own
    that says the files are not in its cache either."""
    names = []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return any(name in _NO_ANSWER for name in names)


_NO_ANSWER = frozenset(
    {
        *("ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"),
        *("ProxyError", "ReadTimeout", "gaierror"),
    }
)
"""Errors of the two HTTP libraries that the hub has used, by name: only one of them is here."""


def _download(
    model: str,
    revision: str | None,
    cache: str | None,
    load_format: str,
    needed: str = "config.json",
) -> Path:
    """Returns the folder, or the GGUF file, of a Hugging Face id after fetching what is missing."""
    one_file = _HUB_FILE.fullmatch(model)
    match = one_file or _HUB_ID.fullmatch(model)
    if match is None or (model.endswith(".gguf") and one_file is None):
        raise ModelNotFoundError(f"there is no folder or file {model}")
    repo = match["repo"]
    wanted = [*_SMALL_FILES, *(() if load_format == "dummy" else (_WEIGHTS,))]
    if one_file:
        wanted = [re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", one_file["file"])]
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=wanted,
            ignore_patterns=None if one_file else list(_DUPLICATES),
        )
        if (Path(str(folder)) / MODULES_FILE).is_file() and not one_file:
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                allow_patterns=module_files(Path(str(folder))),
            )
        found = Path(str(folder), one_file["file"]) if one_file else Path(str(folder))
        if one_file or (found / needed).exists():
            if not found.exists():
                raise FileNotFoundError(f"{repo} has no file {one_file and one_file['file']}")
            return found
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except _hub_errors() as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            folder = cache or constants.HF_HUB_CACHE
            raise ConfigError(
                f"the download folder {folder} cannot be written: {error.strerror}; choose another "
                "with --download-dir, or set HF_HOME",
                field="download_dir",
            ) from error
        if _is_unreachable(error):
            raise ModelNotFoundError(
                f"model {model!r} was not found here, and Hugging Face cannot be reached; give a "
                f"folder, a .gguf file or a demo model ({', '.join(DEMO_NAMES)})"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise ModelNotFoundError(
            f"model {model!r} was not found: there is no such folder or file here, the demo models "
            f"are {', '.join(DEMO_NAMES)}, and Hugging Face answered {type(error).__name__}: "
            f"{reason}"
        ) from error
    ggufs = [name for name in names if name.endswith(".gguf")]
    if not ggufs:
        raise ModelNotFoundError(f"{repo} has neither {needed} nor GGUF files")
    choices = ", ".join(f"{repo}/{name}" for name in ggufs)
    raise ModelNotFoundError(f"{repo} has GGUF files only; choose one: {choices}")
