"""From a model of transformers to artifacts for every backend, and back into a model that can be called.

    from et_cuda_passes.hf import EtConfig, EtExporter, ExportedModel

    exported = EtExporter().export_for_generation(model, inputs, EtConfig(target="cpu,xnnpack", qlinear="4w"))
    exported.save_pretrained("out")
    again = ExportedModel.from_pretrained("out", target="xnnpack")

Needs the extra ``hf``. The first use of a name below imports transformers and registers the format with it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from et_cuda_passes.hf.config import EtConfig
    from et_cuda_passes.hf.exporter import EtExporter, ExportedModel
    from et_cuda_passes.hf.finish import finish_export
    from et_cuda_passes.hf.runner import EtModelRunner

__all__ = ["EtConfig", "EtExporter", "EtModelRunner", "ExportedModel", "finish_export"]

if not TYPE_CHECKING:  # or a type checker would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        # Importing the package must not import transformers: quantize_model_ needs torch and torchao alone.
        if name in __all__:
            from et_cuda_passes.hf import config, exporter, finish, runner

            modules = {"EtModelRunner": runner, "EtConfig": config, "finish_export": finish}
            return getattr(modules.get(name, exporter), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
