"""What the scripts share. See CONTRIBUTING.md for what is where."""

import logging


class _UnusedKernel(logging.Filter):
    """bitsandbytes says on some CPUs that a 4-bit kernel of its own can't be fetched, which nothing here uses."""

    def filter(self, record):
        return "gemm_4bit_forward" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_UnusedKernel())
