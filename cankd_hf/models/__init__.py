"""Student and teacher architectures, and how to build or load them."""


def register() -> None:
    """Registers the pyramid models with `AutoConfig`, the two tasks' auto classes and `AutoImageProcessor`.

    Afterwards our checkpoints load without remote code. Calling it again changes nothing.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForSemanticSegmentation,
        SegformerImageProcessor,
        SegformerImageProcessorPil,
    )
    from transformers.models.auto import modeling_auto

    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
    from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
    from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

    AutoConfig.register(FPNConfig.model_type, FPNConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(FPNConfig, FPNForSemanticSegmentation, exist_ok=True)
    AutoModelForObjectDetection.register(FPNConfig, FPNForObjectDetection, exist_ok=True)
    # Pipelines look models up in these tables of names, and would warn that ours are unsupported.
    names = modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    names[FPNConfig.model_type] = FPNForSemanticSegmentation.__name__
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[FPNConfig.model_type] = FPNForObjectDetection.__name__
    processors: dict[str, type] = {"torchvision": SegformerImageProcessor, "pil": SegformerImageProcessorPil}
    AutoImageProcessor.register(FPNConfig, image_processor_classes=processors, exist_ok=True)
