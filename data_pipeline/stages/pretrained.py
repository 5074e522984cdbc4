"""Networks that others trained, by folder or hub id: what all stages that load one share.

    found = find_pretrained("caption.model", "Salesforce/blip2-opt-2.7b", revision=None)
    network = found.network(Blip2ForConditionalGeneration, ("blip-2",), device="cuda:0", dtype=torch.float16)

Weights are read from safetensors only and code that lies beside them is never run. Every failure is one line.
Files of settings import this one, so torch and transformers are imported when something is loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # all that is read of a model: neither pickles nor code


@dataclass(frozen=True)
class Pretrained:
    """A model that lies on this disk."""

    key: str  # of the settings that name it, for messages: "caption.model"
    model: str  # as it is named there
    folder: Path
    revision: str  # commit of the hub, or content hash of the folder

    def network(
        self, network: Any, kinds: Sequence[str], device: str, dtype: torch.dtype, **options: Any
    ) -> torch.nn.Module:
        """The network, ready to look.

        Args:
            network: class of transformers that loads it.
            kinds: `model_type`s that its configuration may have; none given: whatever the class takes.
            device: "cpu", "cuda:0" …
            dtype: of its weights; parts that the class itself keeps in float32 stay so.
        Raises:
            UserError: it cannot be read, is of another kind, or lacks weights.
        """
        from transformers import AutoConfig

        if not any(self.folder.glob("*.safetensors")):
            raise UserError(
                f"{self}: holds no .safetensors file; pickled weights are not read: give a folder or revision with it"
            )
        hush_transformers()
        with one_line_errors(str(self)):
            found = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False).model_type
            if kinds and found not in kinds:
                raise UserError(f"{self}: holds a network of type {found!r}; expected {' or '.join(kinds)}")
            loaded, told = network.from_pretrained(
                self.folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
            lacking = sorted(str(entry) for entry in (*told["missing_keys"], *told["mismatched_keys"]))
            if lacking:
                raise UserError(f"{self}: incomplete, lacks {len(lacking)} weights such as {lacking[0]}")
            return loaded.to(usable_device(device)).eval().requires_grad_(False)

    def processor(self, processor: Any, **options: Any) -> Any:
        """What turns pictures and texts into the network's inputs.

        Args:
            processor: class of transformers that loads it: a processor, an image processor or a tokenizer.
        Raises:
            UserError: its files are not there or do not fit.
        """
        hush_transformers()
        with one_line_errors(str(self)):
            return processor.from_pretrained(self.folder, local_files_only=True, **options)

    def provenance(self, backend: str) -> Provenance:
        """What the records say of it: the hub id, or the folder's name."""
        given = Path(self.model).expanduser()
        return Provenance(backend, given.resolve().name if given.is_dir() else self.model, self.revision)

    def __str__(self) -> str:
        return f"{self.key}={self.model}"


def find_pretrained(key: str, model: str, revision: str | None = None) -> Pretrained:
    """The model of that name: a folder, or a hub id, which is fetched unless this disk holds it already.

    Args:
        key: of the settings that name it, for messages.
        model: folder (`~` is the home) or hub id.
        revision: branch, tag or commit of a hub id; None: its main branch.
    Raises:
        UserError: neither; the hub cannot be reached or has no such model; a revision of a folder.
    """
    folder, name = Path(model).expanduser(), f"{key}={model}"
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{name}: revision={revision} is for hub ids, and this is a folder; leave it out")
        return Pretrained(key, model, folder, content_hash(_model_files(folder)))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UserError(f"{name}: no such folder; give a folder or a hub id, which looks like owner/name")
    snapshot = _snapshot(name, model, revision)
    return Pretrained(key, model, snapshot, snapshot.name)


def _snapshot(name: str, model: str, revision: str | None) -> Path:
    """The folder `snapshots/COMMIT` of the hub's cache, filled. Without the hub, what lies there already is taken."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": [*MODEL_FILES], "ignore_patterns": ["*/*"]}
    try:
        if revision and re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes: the hub need not be asked
            with suppress(LocalEntryNotFoundError):
                folder = Path(snapshot_download(model, local_files_only=True, **wanted))
                if any(folder.glob("*.safetensors")):
                    return folder
        return Path(snapshot_download(model, **wanted))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: no such folder, not on this disk{at}, and the hub cannot be reached ({_one_line(error, 120)}); "
            "give a folder, or connect and try again"
        ) from error
    except Exception as error:  # the hub's client lets its transport's own errors through
        raise UserError(
            f"{name}: not to be had from the hub{at} ({_one_line(error, 160)}); check id, revision and your login"
        ) from error


def content_hash(files: Iterable[Path]) -> str:
    """Names and contents of files as one short text, "sha256:…"; where the folder lies does not count."""
    whole = hashlib.sha256()
    for file in sorted(files):
        content = hashlib.sha256()
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                content.update(part)
        whole.update(f"{file.name}\0{content.hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()[:16]}"


def resolve_dtype(name: DtypeName, device: str) -> torch.dtype:
    """The `torch.dtype` of a name.

    `auto` is float32 on the CPU. On an accelerator it is bfloat16, whose range is that of float32 (some language
    models overflow in float16), or float16 where bfloat16 would be computed in detours.

    Raises:
        UserError: the device cannot be used.
    """
    import torch

    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    kind = torch.device(usable_device(device)).type
    if kind == "cpu":
        return torch.float32
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def usable_device(name: str) -> str:
    """The name of a device that torch can use.

    Raises:
        UserError: it cannot.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name}: cannot be used ({str(error).splitlines()[0]}); expected cpu, cuda or cuda:N"
        ) from error
    return name


def hush_transformers() -> None:
    """Keep loading bars and warnings of transformers off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def one_line_errors(subject: str) -> Iterator[None]:
    """Tell what libraries raise while they load something, in one line that begins with `subject`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    told = (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, ImportError)
    try:
        yield
    except (*told, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{subject}: cannot be loaded ({_one_line(error, 240)})") from error


def _model_files(folder: Path) -> list[Path]:
    return [file for pattern in MODEL_FILES for file in folder.glob(pattern)]


def _one_line(error: Exception, length: int) -> str:
    return " ".join(str(error).split())[:length]
