"""Private parts of Hydra and OmegaConf: the source that reads config files."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from omegaconf._utils import get_yaml_loader

__all__ = ["BaseFileSource", "get_yaml_loader", "read_header", "register_file_source"]


class BaseFileSource(FileConfigSource):
    """Hydra's config source of files."""

    def get_path(self, config_path: str) -> Path:
        """Return the path of a config file."""
        return Path(self.path) / self._normalize_file_name(config_path)


def read_header(text: str) -> dict[str, str | None]:
    """Read the header of a config file (`# @package ...`)."""
    return ConfigSource._get_header_dict(text)


def register_file_source(source: type[FileConfigSource]) -> None:
    """Make Hydra read its files through this source."""
    Plugins.instance()  # registers Hydra's own sources first
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = source
