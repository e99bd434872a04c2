"""The stand-in device computes as CUDA would, and names the faults that are planted here."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from torch import Tensor

from fake_gpu import stand_in

pytestmark = pytest.mark.fakegpu


def ramp(*shape: int) -> Tensor:
    """Return 0, 1, 2, ... as float32 on the device."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32, device="cuda").view(shape)


# ---- values


def test_values_are_those_of_the_cpu() -> None:
    x = ramp(2, 3)
    assert (x @ x.t()).tolist() == [[5, 14], [14, 50]]
    assert x[x > 2].tolist() == [3, 4, 5]
    assert (x > 2).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]
    assert torch.equal(x, x) and not torch.equal(x, x + 1)
    assert x[:, 1:].cpu().tolist() == [[1, 2], [4, 5]]
    assert "3., 4., 5." in repr(x)


def test_an_operation_in_place_reads_what_was_there() -> None:
    x = torch.tensor([3.0, 1.0, 2.0], device="cuda")
    torch.sort(x, out=(x, torch.empty(3, dtype=torch.long, device="cuda")))
    assert x.tolist() == [1, 2, 3]
    x.cumsum_(0)
    assert x.tolist() == [1, 3, 6]


def test_conversions_and_copies_have_values_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.tensor([1, 2], device="cuda")
        assert x.float().tolist() == [1.0, 2.0]
        assert x[None].expand(2, 2).reshape(-1).tolist() == [1, 2, 1, 2]
        assert x[:, None].expand(2, 2).contiguous().tolist() == [[1, 1], [2, 2]]


def test_values_in_inference_mode() -> None:
    with torch.inference_mode():
        x = ramp(2, 3).bfloat16()
        y = torch.nn.functional.linear(x, x.clone().t().contiguous().t()).float()
        assert y.tolist() == [[5, 14], [14, 50]]
        assert x.t().reshape(-1).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_step_of_fused_adamw_is_the_cpus() -> None:
    start = torch.linspace(-1, 1, 8)
    found = []
    for device in ("cpu", "cuda"):
        weight = start.to(device, copy=True).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        weight.pow(2).sum().backward()
        optimizer.step()
        found.append(weight.detach().cpu())
    assert torch.equal(*found)


def test_a_product_of_half_types_has_an_output_in_float32() -> None:
    x = (1 + ramp(4, 4) / 1000).bfloat16()
    wide = torch.mm(x, x, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.cpu(), x.cpu().float() @ x.cpu().float())


def test_a_generator_on_the_device_draws_by_its_seed_and_offset() -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    first, second = (torch.randint(1000, (8,), generator=generator, device="cuda") for _ in "ab")
    state = generator.get_state()
    third = torch.rand(8, generator=generator, device="cuda")
    assert not torch.equal(first, second)
    generator.manual_seed(7)
    assert torch.equal(first, torch.randint(1000, (8,), generator=generator, device="cuda"))
    generator.set_state(state)
    assert torch.equal(third, torch.rand(8, generator=generator, device="cuda"))


def test_drawing_on_the_device_leaves_the_hosts_generator_as_it_is() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = torch.rand(4, device="cuda")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)


# ---- counts and memory


def test_launches_copies_and_synchronisations_are_counted() -> None:
    x = ramp(4)
    with stand_in.counting() as seen:
        (x + 1).tolist()
    expected = {"kernel": 1, "d2h": 1, "d2h_bytes": 16, "pageable_d2h": 1, "stream_sync": 1}
    assert {k: seen.get(k) for k in expected} == expected


def test_a_mask_waits_for_the_device() -> None:
    x = ramp(4)
    with stand_in.counting() as seen:
        x[x > 1]
    assert seen["stream_sync"] == 1


def test_memory_ends_at_the_capacity() -> None:
    torch.cuda.empty_cache()  # as torch does before it gives up
    free, total = torch.cuda.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(total, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (free, total)


def test_a_peak_outlives_the_release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    stand_in.reset_peak()
    before = stand_in.used_bytes()
    block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert stand_in.used_bytes() == before
    assert stand_in.peak_bytes() == before + (64 << 20)


def test_a_freed_storage_is_not_read() -> None:
    x = ramp(8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"aten::add: freed .* tensor of \(8,\)"):
        x + 1


def test_segments_expand_where_physical_memory_is_mapped() -> None:
    settings = torch._C._accelerator_setAllocatorSettings
    torch.cuda.empty_cache()
    settings("expandable_segments:True")
    try:
        before = stand_in.used_bytes()
        with stand_in.counting() as seen:
            blocks = [ramp(8 << 20) for _ in range(3)]
        assert seen["map"] >= 3 and seen["malloc_bytes"] >= 3 * (32 << 20)
        assert [int(x[-1]) for x in blocks] == [(8 << 20) - 1] * 3
        ends = sorted(x.data_ptr() for x in blocks)
        assert ends[2] - ends[0] == 2 * (32 << 20)  # one segment, which has grown
        del blocks
        torch.cuda.empty_cache()
        assert stand_in.used_bytes() == before
    finally:
        settings("expandable_segments:False")


# ---- graphs


def test_a_capture_computes_nothing_and_each_replay_does() -> None:
    total, twice = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += 1
        twice.copy_(total * 2)
        noise = torch.rand(2, device="cuda")
    assert total.tolist() == [0, 0]
    graph.replay()
    first = noise.tolist()
    graph.replay()
    assert total.tolist() == [2, 2] and twice.tolist() == [4, 4]
    assert noise.tolist() != first


def test_a_replay_does_not_use_freed_memory() -> None:
    x = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
    graph.replay()
    del x
    gc.collect()
    torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="freed or unmapped device memory"):
        graph.replay()


def allocate() -> None:
    address = ctypes.c_void_p()
    assert stand_in.library().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(1 << 20)) != 0


def test_work_on_a_side_stream_is_joined_before_a_capture_ends() -> None:
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()

    def capture(joins: bool) -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.add_(1)
            if joins:
                torch.cuda.current_stream().wait_stream(side)

    capture(True)
    with pytest.raises(RuntimeError, match="work that the capturing stream does not wait for"):
        capture(False)


def unregister(pinned: Tensor) -> None:
    error = torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())
    assert int(error) != 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, pinned: x.sum().item(), "cudaStreamSynchronize"),
        (lambda x, pinned: torch.cuda.synchronize(), "cudaDeviceSynchronize"),
        (lambda x, pinned: allocate(), "cudaMalloc"),
        (lambda x, pinned: unregister(pinned), "cudaHostUnregister"),
        (lambda x, pinned: x[x > 0], "cudaStreamSynchronize"),
    ],
    ids=["item", "synchronize", "malloc", "unregister", "mask"],
)
def test_a_call_that_is_illegal_in_a_capture_is_named(call, named: str) -> None:  # type: ignore[no-untyped-def]
    x = ramp(4)
    pinned = torch.zeros(4096, dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(pinned.data_ptr(), 4096, 0)) == 0
    with (
        pytest.raises(RuntimeError, match=f"{named} broke the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(x, pinned)
    assert int(torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())) == 0
    assert (x + 1).tolist() == [1, 2, 3, 4]
