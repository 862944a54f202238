"""The device is chosen before any test of this folder imports a kernel."""

from tests.backends.cuda import device  # noqa: F401
