"""A GPU, or the host in its place: there kernels run in Triton's interpreter, for tests."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from ...errors import PeltonError
from ...ledger import available_memory


class Device:
    """The device that an executor works on, and the stream that orders its work."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        # Sums in float32, also where cuBLAS splits them up. The setting is the process's.
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        self.is_cuda = torch_device.type == "cuda"
        self.stream = torch.cuda.Stream(torch_device) if self.is_cuda else None
        #: Streaming multiprocessors; what runs in the interpreter has no use for more than one.
        self.num_sms = torch.cuda.get_device_properties(torch_device).multi_processor_count if self.is_cuda else 1

    @property
    def capability(self) -> tuple[int, int] | None:
        """Of a GPU; None where kernels run in the interpreter, which can do everything."""
        return torch.cuda.get_device_capability(self.torch_device) if self.is_cuda else None

    @property
    def architecture(self) -> str:
        """Such as ``sm_90``."""
        return "interpreter" if self.capability is None else "sm_{}{}".format(*self.capability)

    @property
    def has_fp8_products(self) -> bool:
        """From Ada on."""
        return self.capability is None or self.capability >= (8, 9)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else "interpreter"

    def available(self, share: float) -> int:
        """Bytes that may still be taken, if all that anybody takes is to be that share of the device's memory."""
        if not self.is_cuda:
            return available_memory() // 2
        # What torch keeps of memory that was freed is there for whoever asks next.
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return max(0, int(free - (1 - share) * total))

    def active(self) -> AbstractContextManager[object]:
        """In it, what is started joins the stream. Threads have a current stream each."""
        return torch.cuda.stream(self.stream) if self.is_cuda else nullcontext()

    def synchronize(self) -> None:
        """Wait for all that was started."""
        if self.stream is not None:
            self.stream.synchronize()

    def hold(self, seconds: float) -> None:
        """Let the device do nothing for about so long, so that what is started meanwhile runs without gaps after it."""
        if self.is_cuda:
            torch.cuda._sleep(int(seconds * 1.5e9))  # cycles of a clock of 1 to 2 GHz

    def mark(self) -> Mark:
        """The moment at which all that was started so far has ended."""
        return Mark(self.stream)


class Mark:
    """A point in a stream."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event = None
        self._time = 0.0
        if stream is None:
            self._time = time.perf_counter()
        else:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(stream)

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Of device time. Both must have passed."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def chosen_device() -> torch.device:
    """The current GPU; the host, with kernels in Triton's interpreter, if ``PELTON_CUDA_DEVICE=cpu`` says so.

    Raises:
        PeltonError: there is no GPU that this installation can use.
    """
    if os.environ.get("PELTON_CUDA_DEVICE") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise PeltonError(
            f"torch {torch.__version__} was built without CUDA", "install the build for your CUDA, see pytorch.org"
        )
    if not torch.cuda.is_available():
        raise PeltonError("torch finds no NVIDIA GPU", "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise PeltonError(
            f"{name} has compute capability {capability[0]}.{capability[1]}", "use a GPU of 8.0 (Ampere) or newer"
        )
    return device
