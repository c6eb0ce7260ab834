"""Module paths that kohya's scripts and LyCORIS flatten: ``lora_unet_up_blocks_1_attentions_0_proj_in``.

Which underscores were dots is not in the file. Names that are known to have underscores of their own stay whole,
numbers and known single words stand alone, and words that are not known stay together.
"""

from __future__ import annotations

_PREFIXES = ("lora_", "lycoris_", "base_model_model_")
# As diffusers calls the models of a pipeline.
_MODELS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}

# Names of modules in Stable Diffusion 1 to 3, SDXL, PixArt, FLUX, Qwen-Image, Wan, HunyuanVideo and Lumina, and in
# their text encoders (CLIP, T5, LLaMA), as diffusers, transformers and the models' own code spell them.
_VOCABULARY = """
unet transformer text_encoder text_encoder_2 text_encoder_3 text_model diffusion_model prior_unet model encoder
decoder te te1 te2 te3 language_model vision_model llm_adapter
down_blocks mid_block up_blocks input_blocks middle_block output_blocks attentions resnets transformer_blocks
single_transformer_blocks double_blocks single_blocks joint_blocks double_stream_blocks single_stream_blocks
context_refiner noise_refiner cap_embedder blocks block layers layer downsamplers upsamplers
attn attn1 attn2 self_attn cross_attn attention img_attn txt_attn SelfAttention EncDecAttention self_attention
to_q to_k to_v to_qkv to_out add_q_proj add_k_proj add_v_proj to_add_out q_proj k_proj v_proj o_proj out_proj
qkv_proj qkv proj q k v o k_img v_img q_norm k_norm norm_q norm_k qkv_mlp to_qkv_mlp_proj
ff ff_context net mlp img_mlp txt_mlp ffn feed_forward proj_in proj_out proj_mlp fc1 fc2 w1 w2 w3 c_fc c_proj
gate_proj up_proj down_proj DenseReluDense wi wi_0 wi_1 wo linear linear1 linear2 linear_1 linear_2 lin
img_mod txt_mod modulation adaLN_modulation norm norm1 norm2 norm3 norm_out norm1_context norm_final
conv conv1 conv2 conv_in conv_out conv_shortcut op in_layers out_layers emb_layers skip_connection nin_shortcut
time_emb_proj time_embedding time_embed time_projection text_embedding patch_embedding add_embedding label_emb
time_in vector_in guidance_in txt_in img_in in_layer out_layer final_layer context_block x_block context_embedder
x_embedder t_embedder y_embedder time_text_embed timestep_embedder text_embedder guidance_embedder pos_embed
text_projection token_embedding embed_tokens shared adaln_single emb
"""
# Of these, blocks as the models' own code has them.
_OWN_CODE = {"input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks", "joint_blocks"}
_WORDS = frozenset(_VOCABULARY.split())
_LONGEST = max(word.count("_") + 1 for word in _WORDS)


def dotted(name: str) -> str:
    """The dotted path of a flattened name; a name that is not flattened stays as it is."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None or "." in name:
        return name
    words = name.removeprefix(prefix).split("_")
    path: list[str] = []
    known = True
    while words:
        size = next((n for n in range(_LONGEST, 0, -1) if _is_name("_".join(words[:n]))), 0)
        if size or known:
            path.append("_".join(words[: max(size, 1)]))
        else:
            path[-1] += f"_{words[0]}"
        known = size > 0
        words = words[max(size, 1) :]
    return ".".join([_MODELS.get(path[0], path[0]), *path[1:]])


def is_known(name: str) -> bool:
    """Whether all components of a flattened name's dotted path are module names of diffusers or transformers.

    Not so with blocks of a model's own code, which diffusers has renamed.
    """
    path = dotted(name).split(".")
    models = ("unet", "transformer", *_MODELS.values())
    return path[0] in models and not is_own_code(name) and all(map(_is_name, path))


def is_own_code(name: str) -> bool:
    """Whether a flattened name has blocks as the model's own code calls them."""
    return not _OWN_CODE.isdisjoint(dotted(name).split("."))


def _is_name(text: str) -> bool:
    return text in _WORDS or (text.isascii() and text.isdigit())
