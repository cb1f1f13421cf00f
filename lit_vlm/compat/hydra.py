"""Private parts of Hydra and OmegaConf: the source that reads config files, and the steps of a composition."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader

__all__ = [
    "BaseFileSource",
    "FileComposition",
    "apply_settings",
    "get_yaml_loader",
    "read_header",
    "register_file_source",
]


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


class FileComposition:
    """The config files that a set of choices selects, and the config that Hydra composes of them.

    Attributes:
        files: the files in merge order.
    """

    def __init__(self, loader: ConfigLoader, config_name: str, choices: list[str]) -> None:
        assert isinstance(loader, ConfigLoaderImpl)
        self._loader = loader
        self._parsed, self._repository = loader._parse_overrides_and_create_caching_repo(config_name, choices)
        selected = create_defaults_list(
            self._repository, config_name, self._parsed, prepend_hydra=True, skip_missing=False
        )
        self.files, self._settings = tuple(selected.defaults), selected.config_overrides
        self._outcome: DictConfig | Exception | None = None

    @property
    def config(self) -> DictConfig:
        """The composed config, read-only. An error is kept as well: Hydra's repository serves for one composition."""
        if self._outcome is None:
            try:
                self._outcome = self._compose()
                OmegaConf.set_readonly(self._outcome, True)
            except Exception as error:
                self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _compose(self) -> DictConfig:
        ConfigLoaderImpl.validate_sweep_overrides_legal(self._parsed, RunMode.RUN, from_shell=False)
        config = self._loader._compose_config_from_defaults_list(list(self.files), self._repository)
        OmegaConf.set_struct(config, True)
        OmegaConf.set_readonly(config.hydra, False)
        ConfigLoaderImpl._apply_overrides_to_config(self._settings, config)
        with open_dict(config):
            del config["hydra"]
        return config


def apply_settings(overrides: list[Override], config: DictConfig) -> None:
    """Apply overrides of values to a composed config, with Hydra's errors."""
    ConfigLoaderImpl.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=False)
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
