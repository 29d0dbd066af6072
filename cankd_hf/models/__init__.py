"""Student and teacher architectures, and how to build or load them."""


def register() -> None:
    """Registers the pyramid models and DINO with `AutoConfig`, the tasks' auto classes and `AutoImageProcessor`.

    Afterwards our checkpoints load without remote code. Calling it again changes nothing.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForDepthEstimation,
        AutoModelForImageClassification,
        AutoModelForInstanceSegmentation,
        AutoModelForObjectDetection,
        AutoModelForSemanticSegmentation,
        DeformableDetrImageProcessor,
        DeformableDetrImageProcessorPil,
        SegformerImageProcessor,
        SegformerImageProcessorPil,
    )

    from cankd_hf.models.dino.configuration_cankd_dino import DINOConfig
    from cankd_hf.models.dino.modeling_cankd_dino import DINOForObjectDetection
    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
    from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
    from cankd_hf.models.fpn.modeling_cankd_fpn_classification import FPNForImageClassification
    from cankd_hf.models.fpn.modeling_cankd_fpn_depth import FPNForDepthEstimation
    from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
    from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation

    AutoConfig.register(FPNConfig.model_type, FPNConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(FPNConfig, FPNForSemanticSegmentation, exist_ok=True)
    AutoModelForObjectDetection.register(FPNConfig, FPNForObjectDetection, exist_ok=True)
    AutoModelForInstanceSegmentation.register(FPNConfig, FPNForInstanceSegmentation, exist_ok=True)
    AutoModelForDepthEstimation.register(FPNConfig, FPNForDepthEstimation, exist_ok=True)
    AutoModelForImageClassification.register(FPNConfig, FPNForImageClassification, exist_ok=True)
    processors: dict[str, type] = {"torchvision": SegformerImageProcessor, "pil": SegformerImageProcessorPil}
    AutoImageProcessor.register(FPNConfig, image_processor_classes=processors, exist_ok=True)
    AutoConfig.register(DINOConfig.model_type, DINOConfig, exist_ok=True)
    AutoModelForObjectDetection.register(DINOConfig, DINOForObjectDetection, exist_ok=True)
    processors = {"torchvision": DeformableDetrImageProcessor, "pil": DeformableDetrImageProcessorPil}
    AutoImageProcessor.register(DINOConfig, image_processor_classes=processors, exist_ok=True)
