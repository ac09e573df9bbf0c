"""What the scripts share. See CONTRIBUTING.md for what is where."""

import logging


class _Without(logging.Filter):
    """Drops the records that have these words in them."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def filter(self, record):
        return self.words not in record.getMessage()


for _logger, _words in {
    # bitsandbytes says on some CPUs that a 4-bit kernel of its own can't be fetched, which nothing here uses.
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",
    # diffusers looks for torchao's old tensor classes, which only pickles have; and torch minds how torchao registers.
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "register_constant() on Enum subclasses",
    # deepspeed looks for a GPU and says what it found.
    "DeepSpeed": "Setting accelerator to CPU",
}.items():
    logging.getLogger(_logger).addFilter(_Without(_words))
