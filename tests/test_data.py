import contextlib
import hashlib
import http.client
import re
import shutil
import tempfile

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST

from cnn_pruning import fashion_mnist
from cnn_pruning.experiments import data
from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.paths import ROOT


@pytest.fixture(scope="module")
def splits():
    torch.manual_seed(1)
    return fashion_mnist()


@pytest.fixture
def root(tmp_path):
    """A folder with copies of the four archives; removed at once, because it gets large."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in FashionMNIST.resources:
        shutil.copy(ROOT / "data" / "FashionMNIST" / "raw" / name, raw)
    yield tmp_path
    shutil.rmtree(tmp_path)


def raw_of(root):
    return root / "FashionMNIST" / "raw"


def original_of(train):
    """The data as torchvision reads them."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "data" / "FashionMNIST", f"{folder}/FashionMNIST")
        return FashionMNIST(folder, train, download=True)  # extracts what is there


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one.tensors, other.tensors, strict=True):
            assert torch.equal(a, b)


def examples(*datasets):
    """All of their examples, each as the bytes of its image and its label, sorted."""
    images = torch.cat([dataset.tensors[0] for dataset in datasets])
    labels = torch.cat([dataset.tensors[1] for dataset in datasets])
    pixels = images.mul(255).round_().to(torch.uint8).flatten(1)
    rows = torch.cat([pixels, labels.to(torch.uint8).unsqueeze(1)], dim=1)
    return sorted(map(bytes, rows.numpy()))


def test_splits_have_the_sizes_types_and_ranges_that_are_promised(splits):
    assert [len(dataset) for dataset in splits] == [55_000, 5_000, 10_000]
    for dataset in splits:
        images, labels = dataset.tensors
        assert type(dataset) is TensorDataset
        assert (images.shape, images.dtype) == ((len(dataset), 1, 28, 28), torch.float32)
        assert (labels.shape, labels.dtype) == ((len(dataset),), torch.int64)
        assert (images.min(), images.max()) == (0, 1)
        assert labels.unique().tolist() == list(range(10))


def test_the_validation_set_has_500_of_each_class(splits):
    assert splits[1].tensors[1].bincount().tolist() == [500] * 10


def test_the_validation_set_is_the_one_of_every_result_in_this_repository(splits):
    images, labels = splits[1].tensors
    pixels = images.mul(255).round().to(torch.uint8)
    digest = hashlib.md5(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "b04286e1f81a5b3cf2c7e02a686ecc2e"


def test_train_and_validation_together_are_the_original_training_set(splits):
    # As often as there: so no image is in both, none is lost, and each has its own label.
    original = original_of(train=True)
    whole = TensorDataset(original.data.unsqueeze(1) / 255, original.targets)
    assert examples(*splits[:2]) == examples(whole)


def test_the_test_set_is_the_original_one_in_its_order(splits):
    original = original_of(train=False)
    assert torch.equal((splits[2].tensors[0] * 255).round().squeeze(1), original.data.float())
    assert torch.equal(splits[2].tensors[1], original.targets)


def test_the_draw_is_fixed_and_takes_none_of_the_callers_random_numbers(splits):
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert_equal(fashion_mnist(), splits)
    assert torch.equal(torch.get_rng_state(), before)


def test_archives_are_read_offline_and_nothing_is_written(root, splits, monkeypatch):
    def no_network(*args, **kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(data, "urlopen", no_network)
    before = sorted(root.rglob("*"))
    raw_of(root).chmod(0o500)
    try:
        assert_equal(fashion_mnist(str(root)), splits)
    finally:
        raw_of(root).chmod(0o700)
    assert sorted(root.rglob("*")) == before


def test_missing_archives_are_downloaded_and_checked(root, splits, tmp_path_factory, monkeypatch):
    mirror = tmp_path_factory.mktemp("mirror")
    for file in [*raw_of(root).iterdir()][:2]:
        file.rename(mirror / file.name)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{mirror.as_uri()}/"])
    assert_equal(fashion_mnist(root), splits)
    names = sorted(name for name, _ in FashionMNIST.resources)
    assert sorted(file.name for file in raw_of(root).iterdir()) == names

    (raw_of(root) / names[0]).unlink()
    (mirror / names[0]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is damaged"):
        fashion_mnist(root)


@pytest.mark.parametrize(
    "damage", [lambda old: old[:1000], lambda old: b"", lambda old: old + b"0"]
)
def test_a_damaged_archive_is_an_error_that_names_the_file(root, damage):
    archive = raw_of(root) / "t10k-labels-idx1-ubyte.gz"
    content = damage(archive.read_bytes())
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(archive))) as error:
        fashion_mnist(root)
    assert hashlib.md5(content).hexdigest() in str(error.value)
    assert archive.read_bytes() == content  # it is the reader's to delete


def test_once_the_damaged_archive_is_restored_the_data_are_read(root, splits):
    archive = raw_of(root) / "train-labels-idx1-ubyte.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=re.escape(str(archive))):
        fashion_mnist(root)
    archive.write_bytes(content)
    assert_equal(fashion_mnist(root), splits)


def mirror_without_files(monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", ["file:///there-is-no-such-folder/"])


def connection_that_breaks_off(monkeypatch):
    # urllib hands this one on as it is: it is an OSError, but not a URLError.
    def urlopen(*args, **kwargs):
        raise http.client.RemoteDisconnected("Remote end closed connection without response")

    monkeypatch.setattr(data, "urlopen", urlopen)


@pytest.mark.parametrize("block", [mirror_without_files, connection_that_breaks_off])
def test_an_archive_that_can_not_be_downloaded_is_an_error_that_names_the_folder(
    root, monkeypatch, block
):
    block(monkeypatch)
    (raw_of(root) / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ConnectionError, match=re.escape(str(raw_of(root)))):
        fashion_mnist(root)


def test_a_download_that_is_cut_off_has_left_nothing(root, monkeypatch):
    archive, seen = raw_of(root) / "train-images-idx3-ubyte.gz", []
    archive.unlink()
    before = sorted(root.rglob("*"))

    class Answer(contextlib.nullcontext):
        def read(self):
            seen.append(sorted(root.rglob("*")))  # what stays if the process is killed here
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "urlopen", lambda *args, **kwargs: Answer(Answer()))
    with pytest.raises(KeyboardInterrupt):
        fashion_mnist(root)
    assert seen == [before] and sorted(root.rglob("*")) == before


def test_a_root_that_is_a_file_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=re.escape(str(file))) as error:
        fashion_mnist(file)
    assert not isinstance(error.value, ConnectionError)


@pytest.mark.parametrize("root", [1, [], b"data", "a\0b", "~nobody-of-this-name"])
def test_a_root_that_is_no_path_is_an_error_that_shows_it(root):
    with pytest.raises(
        ValueError, match=f"root must be a folder, but it is {re.escape(repr(root))}"
    ):
        fashion_mnist(root)


def test_a_folder_that_can_not_be_written_to_is_an_error_that_names_it(root, monkeypatch):
    def refuse(*args, dir, **kwargs):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    monkeypatch.setattr(data, "urlopen", lambda *args, **kwargs: pytest.fail("it was asked"))
    (raw_of(root) / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(OSError, match=re.escape(str(raw_of(root)))) as error:
        fashion_mnist(root)
    assert not isinstance(error.value, ConnectionError)


def test_batches_come_in_order_or_shuffled_and_cover_everything_once():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    for dataset in (data, list(data)):
        plain = list(batches(dataset, 4))
        assert [labels.tolist() for _, labels in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        shuffled = list(batches(dataset, 4, torch.Generator().manual_seed(0)))
        assert [len(labels) for _, labels in shuffled] == [4, 4, 2]
        order = torch.cat([labels for _, labels in shuffled])
        assert order.tolist() != order.sort().values.tolist() == list(range(10))
        for images, labels in plain + shuffled:
            assert torch.equal(images, labels.float())
