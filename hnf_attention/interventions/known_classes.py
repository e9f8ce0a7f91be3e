"""Classes whose query and key weights are known: the names and shapes of their projections tell their rows."""

from __future__ import annotations

import inspect

from torch import nn

from .shards import own_class

#: Attention classes of transformers by their folder. Each was proved inside a whole model, with transformers 4.57 and
#: 5.24: scaling the weights scales the scores of its heads and changes nothing else (tests/test_known_classes.py).
TRANSFORMERS = {
    "albert": ("AlbertAttention", "AlbertSdpaAttention"),
    "altclip": ("AltCLIPAttention", "AltRobertaSelfAttention"),
    "audio_spectrogram_transformer": ("ASTAttention", "ASTSelfAttention"),
    "bart": ("BartAttention",),
    "beit": ("BeitAttention", "BeitSdpaSelfAttention", "BeitSelfAttention"),
    "bert": ("BertSdpaSelfAttention", "BertSelfAttention"),
    "big_bird": ("BigBirdSelfAttention",),
    "bigbird_pegasus": ("BigBirdPegasusDecoderAttention", "BigBirdPegasusSelfAttention"),
    "biogpt": ("BioGptAttention",),
    "bitnet": ("BitNetAttention",),
    "blenderbot": ("BlenderbotAttention",),
    "blip": ("BlipAttention", "BlipTextSelfAttention"),
    "bloom": ("BloomAttention",),
    "canine": ("CanineSelfAttention",),
    "chinese_clip": ("ChineseCLIPTextSelfAttention", "ChineseCLIPVisionAttention"),
    "clip": ("CLIPAttention",),
    "cohere": ("CohereAttention",),
    "cohere2": ("Cohere2Attention",),
    "data2vec": ("Data2VecAudioAttention", "Data2VecVisionSdpaSelfAttention"),
    "deepseek_v2": ("DeepseekV2Attention",),
    "deepseek_v3": ("DeepseekV3Attention",),
    "deit": ("DeiTAttention", "DeiTSelfAttention"),
    "diffllama": ("DiffLlamaAttention", "DiffLlamaSdpaAttention"),
    "dinov2": ("Dinov2Attention", "Dinov2SelfAttention"),
    "dinov3_vit": ("DINOv3ViTAttention",),
    "distilbert": ("DistilBertSdpaAttention", "DistilBertSelfAttention", "MultiHeadSelfAttention"),
    "electra": ("ElectraSelfAttention",),
    "esm": ("EsmSelfAttention",),
    "eurobert": ("EuroBertAttention",),
    "falcon": ("FalconAttention",),
    "flava": ("FlavaSelfAttention",),
    "fsmt": ("Attention",),
    "gemma": ("GemmaAttention",),
    "gemma2": ("Gemma2Attention",),
    "git": ("GitSelfAttention", "GitVisionAttention"),
    "glm4": ("Glm4Attention",),
    "gpt2": ("GPT2Attention",),
    "gpt_neo": ("GPTNeoSelfAttention",),
    "gpt_neox": ("GPTNeoXAttention",),
    "gpt_oss": ("GptOssAttention",),
    "gptj": ("GPTJAttention",),
    "granite": ("GraniteAttention",),
    "hiera": ("HieraMaskUnitAttention",),
    "hubert": ("HubertAttention",),
    "imagegpt": ("ImageGPTAttention",),
    "jamba": ("JambaAttention", "JambaSdpaAttention"),
    "layoutlm": ("LayoutLMSelfAttention",),
    "led": ("LEDDecoderAttention", "LEDEncoderSelfAttention"),
    "llama": ("LlamaAttention",),
    "longformer": ("LongformerSelfAttention",),
    "longt5": ("LongT5Attention", "LongT5LocalAttention"),
    "luke": ("LukeSelfAttention",),
    "lxmert": ("LxmertAttention",),
    "m2m_100": ("M2M100Attention",),
    "marian": ("MarianAttention",),
    "mbart": ("MBartAttention",),
    "minicpm3": ("MiniCPM3Attention",),
    "mistral": ("MistralAttention",),
    "mixtral": ("MixtralAttention",),
    "mllama": ("MllamaTextSelfAttention",),
    "mobilebert": ("MobileBertSelfAttention",),
    "modernbert": ("ModernBertAttention",),
    "moonshine": ("MoonshineAttention",),
    "mpnet": ("MPNetSelfAttention",),
    "mpt": ("MptAttention",),
    "nemotron": ("NemotronAttention", "NemotronSdpaAttention"),
    "nllb_moe": ("NllbMoeAttention",),
    "nomic_bert": ("NomicBertAttention",),
    "olmo": ("OlmoAttention",),
    "openai": ("Attention",),
    "opt": ("OPTAttention",),
    "owlvit": ("OwlViTAttention",),
    "pegasus": ("PegasusAttention",),
    "pegasus_x": ("PegasusXAttention", "PegasusXGlobalLocalAttention"),
    "perceiver": ("PerceiverSelfAttention",),
    "phi": ("PhiAttention",),
    "phi3": ("Phi3Attention",),
    "pvt": ("PvtEfficientSelfAttention",),
    "qwen2": ("Qwen2Attention",),
    "qwen2_moe": ("Qwen2MoeAttention", "Qwen2MoeSdpaAttention"),
    "recurrent_gemma": ("RecurrentGemmaAttention",),
    "rembert": ("RemBertSelfAttention",),
    "roberta": ("RobertaSdpaSelfAttention", "RobertaSelfAttention"),
    "roformer": ("RoFormerSelfAttention",),
    "segformer": ("SegformerAttention", "SegformerEfficientSelfAttention"),
    "sew": ("SEWAttention",),
    "siglip": ("SiglipAttention",),
    "smollm3": ("SmolLM3Attention",),
    "speech_to_text": ("Speech2TextAttention",),
    "stablelm": ("StableLmAttention", "StableLmSdpaAttention"),
    "starcoder2": ("Starcoder2Attention",),
    "swin": ("SwinAttention", "SwinSelfAttention"),
    "switch_transformers": ("SwitchTransformersAttention",),
    "t5": ("T5Attention",),
    "t5gemma": ("T5GemmaCrossAttention", "T5GemmaSelfAttention"),
    "tapas": ("TapasSelfAttention",),
    "timesformer": ("TimesformerSelfAttention",),
    "umt5": ("UMT5Attention",),
    "unispeech": ("UniSpeechAttention",),
    "videomae": ("VideoMAESelfAttention",),
    "vilt": ("ViltSelfAttention",),
    "visual_bert": ("VisualBertSelfAttention",),
    "vit": ("ViTAttention", "ViTSelfAttention"),
    "vit_mae": ("ViTMAEAttention", "ViTMAESelfAttention"),
    "vivit": ("VivitAttention", "VivitSelfAttention"),
    "wav2vec2": ("Wav2Vec2Attention",),
    "wavlm": ("WavLMAttention",),
    "whisper": ("WhisperAttention",),
    "xglm": ("XGLMAttention",),
    "xlm": ("MultiHeadAttention",),
    "yolos": ("YolosSelfAttention",),
}
#: Others by their module: PyTorch's own, and this project's.
OTHERS = {
    "torch.nn.modules.activation": "MultiheadAttention",
    "hnf_attention.nn.multihead": "MultiheadAttention",
    "hnf_attention.nn.grouped_query": "GroupedQueryAttention",
}


def includes(module: nn.Module) -> bool:
    """Whether a module runs the code of a known class. A replaced forward is not that code."""
    cls = own_class(module)
    forward = inspect.unwrap(cls.forward)
    unchanged = (forward.__module__, forward.__qualname__) == (cls.__module__, f"{cls.__qualname__}.forward")
    return unchanged and "forward" not in vars(module) and _is_known(cls)


def _is_known(cls: type[nn.Module]) -> bool:
    package, _, path = cls.__module__.partition(".models.")
    if package == "transformers":
        return cls.__qualname__ in TRANSFORMERS.get(path.partition(".")[0], ())
    return OTHERS.get(cls.__module__) == cls.__qualname__
