"""The parts of a Qwen audio checkpoint's configuration that trainer and engine build from."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2_5OmniConfig, Qwen2AudioConfig, Qwen2Config

PREPROCESSOR_FILE = "preprocessor_config.json"

ROPE_AXES_KEYS = ("mrope_section", "type")


def decoder_config(text: PretrainedConfig) -> Qwen2Config:
    """The decoder of either family as a plain Qwen2 with its own head.

    Qwen2.5-Omni turns three axes of positions. They are equal wherever a prompt holds no picture and no video
    (transformers' `get_rope_index`), and three equal axes are Qwen2's one. Embedding row `pad_token_id` is dropped as a
    special case: it would get no gradient, and in these families padding is also an end of turn.
    """
    rope = {key: value for key, value in (text.rope_parameters or {}).items() if key not in ROPE_AXES_KEYS}
    if rope.get("rope_type") in (None, "mrope"):
        rope["rope_type"] = "default"
    config = Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        hidden_act=text.hidden_act,
        max_position_embeddings=text.max_position_embeddings,
        initializer_range=text.initializer_range,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=rope,
        attention_dropout=text.attention_dropout,
        use_sliding_window=text.use_sliding_window,
        sliding_window=text.sliding_window,
        max_window_layers=text.max_window_layers,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return config


def unsupported(audio: PretrainedConfig) -> str | None:
    """What an audio tower's configuration asks for that this package does not compute; None when nothing."""
    if audio.activation_function != "gelu":
        return f"activation_function={audio.activation_function!r} (known: 'gelu')"
    if audio.scale_embedding:
        return "scale_embedding=true (known: false)"
    return None


def tiny_audio() -> dict[str, Any]:
    """A tower of 0.2M parameters."""
    return {
        "num_mel_bins": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "d_model": 64,
        "initializer_range": 0.1,
    }


def tiny_text(*, vocab_size: int) -> dict[str, Any]:
    """A decoder of 0.1M parameters; the initial deviation is about 1/sqrt(width), so that sounds can be told apart.

    Heads are 32 wide: vLLM 0.32's CPU attention knows no narrower ones.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }


def tiny_qwen2_audio(*, vocab_size: int, audio_token_id: int, window_s: int) -> dict[str, Any]:
    """`config.json` of a small Qwen2-Audio."""
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": Qwen2AudioConfig.model_type,
        "audio_token_index": audio_token_id,
        "dtype": "float32",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "max_source_positions": 50 * window_s,
            **tiny_audio(),
        },
        "text_config": {
            "model_type": "qwen2",
            "rope_theta": 10_000.0,
            **tiny_text(vocab_size=vocab_size),
        },
    }


def tiny_omni(*, vocab_size: int, audio_ids: tuple[int, int, int]) -> dict[str, Any]:
    """`config.json` of a small Qwen2.5-Omni: `audio_ids` are placeholder, start and end."""
    text = tiny_text(vocab_size=vocab_size)
    head_width = text["hidden_size"] // text["num_attention_heads"]
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": Qwen2_5OmniConfig.model_type,
        "enable_audio_output": True,
        "dtype": "float32",
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "audio_token_index": audio_ids[0],
            "audio_start_token_id": audio_ids[1],
            "audio_end_token_id": audio_ids[2],
            "vision_start_token_id": audio_ids[0],
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "max_source_positions": 1500,
                "n_window": 100,
                "output_dim": text["hidden_size"],
                **tiny_audio(),
            },
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "rope_theta": 50_000.0,
                "rope_scaling": {
                    "mrope_section": [head_width // 2 - 2 * (head_width // 6), head_width // 6, head_width // 6],
                    "rope_type": "default",
                    "type": "default",
                },
                **text,
            },
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder",
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": text["hidden_size"],
                "fullatt_block_indexes": [0],
            },
        },
    }
