"""Checksums by which ranks compare their state: what differs has another one, in every dtype and layout."""

import pytest
import torch

from trackopt.checkpoint.checksums import checksum_of_state, checksums, summarize

LARGE = 5000  # elements, of which a sample is read


def checksum(value, *, complete=False):
    return checksums({"a": value}, complete=complete)["a"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (50, 100)])
def test_another_value_has_another_checksum(dtype, shape):
    zeros, ones = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    assert checksum(zeros) == checksum(zeros.clone()) != checksum(ones)


def test_every_element_counts_in_a_complete_one():
    tensor = torch.zeros(LARGE)
    changed = tensor.clone()
    changed[LARGE - 2] = 1
    assert checksum(tensor, complete=True) != checksum(changed, complete=True)


def test_a_sample_finds_what_has_changed_everywhere():
    tensor = torch.arange(LARGE, dtype=torch.float32)
    assert checksum(tensor) != checksum(tensor + 1)


@pytest.mark.parametrize("complete", [True, False])
def test_views_and_channels_last_are_compared_by_their_elements(complete):
    whole = torch.arange(2.0 * LARGE).reshape(LARGE, 2)
    assert checksum(whole[:, 0], complete=complete) == checksum(whole[:, 0].clone(), complete=complete)
    assert checksum(whole[:, 0], complete=complete) != checksum(whole[:, 1], complete=complete)
    image = torch.randn(8, 16, 6, 6).to(memory_format=torch.channels_last)
    assert checksum(image, complete=complete) == checksum(image.clone(), complete=complete)
    assert checksum(image, complete=complete) != checksum(image + 1, complete=complete)


def test_shape_and_dtype_count():
    assert (
        len({checksum(torch.zeros(4)), checksum(torch.zeros(2, 2)), checksum(torch.zeros(4, dtype=torch.int32))}) == 3
    )


def test_other_values_are_compared_too():
    values = [1, 1.0, "1", None, True, [1, 2], [1, 3], {"a": torch.ones(1)}, {"a": torch.zeros(1)}, torch.empty(0)]
    assert len({checksum(value) for value in values}) == len(values)


def test_what_cannot_be_saved_is_no_difference():
    assert checksum_of_state(lambda: None) == b"" == checksum_of_state(object())


def test_the_summary_covers_keys_and_values():
    sums = checksums({"a": 1, "b": 2}, complete=False)
    others = [checksums({"a": 1, "b": 3}, complete=False), checksums({"a": 1, "c": 2}, complete=False)]
    assert summarize(sums) not in map(summarize, others)
