"""How COAT plugs into the Hugging Face libraries. Each module here imports the library it plugs into; this page none.

``transformers`` finds a quantizer in a registry. ``import hf_coat`` must put ours there, or a checkpoint that was
saved with a ``CoatConfig`` would load without COAT; and the Trainer's callbacks are in a list where ours must be. But
importing these takes seconds, which ``import hf_coat`` should not cost. So :func:`register` waits for somebody else to
import them.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

PLUGS = {"transformers.quantizers.auto": ".quantizer", "transformers.trainer": ".trainer"}


class _WhenImported(MetaPathFinder):
    """Finds nothing by itself: it lets the first import of a module of transformers be followed by our plug's."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module(PLUGS[fullname], __name__)

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Import our plugs: now, where what they plug into is there already, otherwise as soon as it is."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _WhenImported)}
    for name, plug in PLUGS.items():
        if name in sys.modules:
            importlib.import_module(plug, __name__)
        elif name not in waiting:
            sys.meta_path.insert(0, _WhenImported(name))
