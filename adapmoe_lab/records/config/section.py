"""What a section of a config is: its name in the file, its check, its tensors, its JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from adapmoe_lab.records.files import RecordError
from adapmoe_lab.records.tensors import TensorRecord

if TYPE_CHECKING:
    from adapmoe_lab.records.config.tuned_config import TunedConfig

Value = TypeVar("Value")


class SavedSection(NamedTuple):
    """A section as it stands in a file."""

    values: Any
    """What `ConfigSection.to_json` returned; not null."""
    source: str
    """The file and the section, as errors name them."""
    path: Path
    """The file; tensors lie beside it."""
    model: Mapping[str, Any]
    """Identity of the config's model."""


class ConfigSection(ABC, Generic[Value]):
    """One section: all that a config knows of the field of the same name.

    A technique adds a section by a class, a line in the list of sections and a field of the config;
    no other section is touched.

    Attributes:
        name: of the field of the config, and of the section in the file.
        can_be_off: whether the field may be None. Null in a file is then None, else the field's
            default.
        is_later: whether files of earlier versions lack it. Where such a section is off, a config
            has the fingerprint that it had before there was one.
        decides: whether it changes what a model does, and so is in the config's fingerprint.
    """

    name: ClassVar[str]
    can_be_off: ClassVar[bool] = True
    is_later: ClassVar[bool] = False
    decides: ClassVar[bool] = True

    def checked(self, value: Value, config: TunedConfig) -> Value:
        """Return the value to keep in a config, whose model and other fields are set.

        Raises:
            RecordError: it does not fit the model or another section; the text says which.
        """
        return value

    def tensors(self, value: Value) -> TensorRecord | None:
        """Return what is saved in a file beside the JSON; None for nothing."""
        return None

    def fingerprint(self, value: Value, config: TunedConfig) -> str | None:
        """Identify what the section makes a model do; None for nothing."""
        return value.fingerprint()  # pyright: ignore[reportAttributeAccessIssue]

    def to_json(self, value: Value, name: str) -> Any:
        """Return plain JSON values that `from_json` reads back; None for what is as good as off.

        `name` is that of the JSON file without its suffix, which names the file of tensors.
        """
        return value.to_json()  # pyright: ignore[reportAttributeAccessIssue]

    @abstractmethod
    def from_json(self, saved: SavedSection) -> Value:
        """Return the value that `to_json` saved.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names its source.
        """


def is_of_model(fingerprint: str, config: TunedConfig) -> bool:
    """Whether a part was made for a config's model, as far as the config knows.

    Running it tells the rest.
    """
    return fingerprint in (config.model["fingerprint"], config.model.get("partial_fingerprint"))


def file_of(record: TensorRecord, name: str) -> str:
    """Return the name of the file beside `name`.json that holds a record."""
    return f"{name}.{record.sha256[:12]}.safetensors"


def file_beside(path: Path, name: str) -> Path:
    """Return the file of tensors that a config names, which must lie beside it."""
    file = path.with_name(Path(name).name)
    if file.name != name:
        raise RecordError(
            f"{path} names the tensors {name!r}; they must lie beside it, without a folder in "
            "their name."
        )
    if not file.exists():
        raise RecordError(
            f"{path} needs {file.name} beside it, which is not there. Copy both files together, "
            "or export the config again."
        )
    return file
