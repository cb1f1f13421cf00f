"""Fixtures with real photographs for the tests of the sources."""

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos():
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array).resize((60, 40)) for array in load_sample_images().images]


@pytest.fixture
def folder(tmp_path, photos):
    (tmp_path / "사진").mkdir()
    photos[0].save(tmp_path / "사진" / "중국.jpg", quality=95)
    photos[1].save(tmp_path / "flower.png")
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
