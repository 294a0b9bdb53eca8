"""PyTorch on the CPU.

Traps: autograd records what touches a tensor that asks for gradients, so it is off in the scope; float32 matrix products may run in
TensorFloat32 or bfloat16 when somebody set the process-wide precision lower, so the scope sets it to "highest" and puts it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, final

from peft_ref.arrays import Array
from peft_ref.backend import Backend, Host


@final
class TorchBackend(Backend):
    name: ClassVar[str] = "torch"
    library: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install 'peft-ref[torch]'"

    @contextmanager
    def scope(self) -> Iterator[None]:
        torch = self.module
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def hold(self, array: Host) -> Array:
        return self.module.from_numpy(array)

    def fetch(self, array: Array) -> Host:
        host: Host = array.detach().cpu().resolve_conj().resolve_neg().numpy()
        return host
