"""How COAT plugs into the Hugging Face libraries. Each module here imports the library it plugs into; this page none.

``transformers`` finds a quantizer in a registry. ``import hf_coat`` must put ours there, or a checkpoint that was
saved with a ``CoatConfig`` would load without COAT. But importing the registry takes seconds, which ``import hf_coat``
should not cost. So :func:`register` waits for somebody else to import it.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

REGISTRY = "transformers.quantizers.auto"


class _WhenRegistryIsImported(MetaPathFinder):
    """Finds nothing by itself: it lets the first import of the registry be followed by that of our quantizer."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module(".quantizer", __name__)

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Register the quantizer: now if the registry is there already, otherwise as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(".quantizer", __name__)
    elif not any(isinstance(finder, _WhenRegistryIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenRegistryIsImported())
