"""What is known and not run: one row each, told by keys and shapes, so that an error says what a file is.

The first row that fits names it, so those that are told by less come later. Rows of autoencoders are asked before the
architectures are, some of which are told by as little; of all else where no autoencoder is found. Facts: the keys of
diffusers' classes (0.42) and of the publishers' files.
"""

import re
from collections.abc import Callable, Mapping

from app.vae.autoencoder import Shapes

Told = Callable[[Shapes], bool]


def _key(pattern: str, rank: int | None = None) -> Told:
    """Some key begins with the pattern; of a tensor with so many sides, if they are said."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.match(key) and (rank is None or len(shape) == rank) for key, shape in shapes.items()
    )


def _all(*rows: Told) -> Told:
    return lambda shapes: all(row(shapes) for row in rows)


def _any(*rows: Told) -> Told:
    return lambda shapes: any(row(shapes) for row in rows)


def _not(row: Told) -> Told:
    return lambda shapes: not row(shapes)


AUDIO = _any(
    _key(r".*\.weight_g$"),  # convolutions of audio are weight-normalised
    _key(r".*\.parametrizations\.weight\.original0$"),
    _key(r"(encoder|decoder)\.(conv_in|conv1|conv_pre)\.weight$", 3),
    _key(r"(conv_pre|dec_in_proj)\.weight$", 3),
    _key(r"mel_converter\."),
)

UNSUPPORTED: Mapping[str, Told] = {
    "an AutoencoderKLLTX2Audio (sound of LTX-2)": _key(r"(encoder|decoder)\.mid\.block_1\.conv1\.conv\.weight", 4),
    "an autoencoder of sound": AUDIO,
    "an autoencoder of proteins": _key(r"encoder\.init_repr_factory\."),
    "a VQModel (its latents are rows of a table)": _key(r"quantize\.embedding\.weight"),
    "an AsymmetricAutoencoderKL (for inpainting)": _key(r"decoder\.condition_encoder\."),
    "a ConsistencyDecoderVAE": _key(r"decoder_unet\."),
    "an AutoencoderVidTok": _key(r"(encoder|decoder)\.mid\.block_1\.norm1\.norm\.weight"),
    "an AutoencoderKLTemporalDecoder (of Stable Video Diffusion)": _key(
        r"decoder\.(.+\.temporal_res_block|.+\.time_stack|time_conv_out|conv_out\.time_mix_conv|.+\.mix_factor)(\.|$)"
    ),
    "stage A of Stable Cascade (a VQGAN)": _key(r"vquantizer\.codebook"),
    "the encoder of Stable Cascade": _key(r"(encoder\.)?backbone\.1\.0\.block\.0\.1\."),
    "the previewer of Stable Cascade": _all(_key(r"blocks\.11\.num_batches_tracked"), _key(r"blocks\.0\.weight", 4)),
    "an AutoencoderRAE": _key(r"decoder\.decoder_embed\."),
    "the diffusion decoder of LTX-2": _key(r"decoder\.(det_stages\.|conv_in_x_t\.)"),
    "the VAE of MiniMax H3": _any(
        _key(r"decoder\.transformer_blocks\.0\.scale1"), _key(r"encoder\.down\.5\.block\.0\.conv1\.weight", 5)
    ),
    "the VAE of Mochi": _any(
        _key(r"(encoder\.proj_in|decoder\.block_in\.resnets\.0)\."),
        _key(r"(decoder\.|encoder\.)?(blocks\.\d+\.blocks|layers\.\d+)\.\d+\.stack\.\d+\.weight", 5),
    ),
    "the VAE of Cosmos 1": _key(r"(encoder|decoder)\.(conv_in\.conv_s\.|conv_in\.0\.conv3d\.|(un)?patcher3d\.)"),
    "the VAE of Allegro": _key(r"(encoder|decoder)\.temp_conv_(in|out)\."),
    "the VAE of EasyAnimate (an AutoencoderKLMagvit)": _key(r"(encoder|decoder)\.mid_block\.convs\."),
    "the upscaling VAE of Kandinsky 6": _key(r"decoder\.mid\.block_1\.norm1\.norm_layer\.gamma"),
    "the VAE of Kandinsky's KVAE, for clips": _key(r"decoder\.mid\.block_1\.norm1\.norm_layer\.norm_layer\."),
    "the VAE of CogVideoX": _all(
        _key(r"decoder\.conv_in\.conv\.weight", 5),
        _key(r"decoder\.mid(_block\.resnets\.0|\.block_1)\.norm1\.norm_layer\.weight"),
    ),
    "the VAE of Kandinsky's KVAE": _key(r"decoder\.mid\.block_1\.norm1\.norm_layer\.weight"),
    "the VAE of HunyuanVideo 1.5, or of the refiner of HunyuanImage": _all(
        _key(r"(encoder|decoder)\.conv_in\.conv\.weight", 5),
        _key(r"(encoder\.down|decoder\.up)(_blocks)?\.0\.(resnets|block)\.0\.norm1\.gamma"),
    ),
    "the VAE of LTX-Video or LTX-2": _any(
        _key(r"per_channel_statistics\.(mean|std)-of-means"),
        _all(_key(r"latents_(mean|std)$"), _key(r"(encoder|decoder)\.conv_in\.conv\.weight", 5)),
        _key(r"decoder\.up_blocks\.0\.res_blocks\.0\.conv1\.conv\.weight", 5),
    ),
    "the VAE of HunyuanVideo": _all(
        _key(r"(encoder|decoder)\.conv_in\.conv\.weight", 5),
        _key(r"(encoder\.down|decoder\.up)_blocks\.0\.resnets\.0\.norm1\.weight"),
    ),
    "a tiny autoencoder of clips (TAEHV)": _key(r"(taehv\.)?(encoder|decoder)\.\d+\.conv\.weight", 4),
    "a T5 text encoder": _key(r"encoder\.block\.0\.layer\.0\.SelfAttention\."),
    "an autoencoder of clips, of a kind not known here": _all(
        _key(r"(encoder|decoder)\.conv_in(\.conv)?\.weight", 5),
        _not(_key(r"(encoder|decoder)\.mid_block\.resnets\.0\.norm1\.gamma")),  # Wan 2.1's, of which a frame is run
    ),
}
"""Autoencoders, and what has the words of one."""

NO_VAE: Mapping[str, Told] = {
    "a LoRA": _key(r".*(\.|_)(lora_(up|down|A|B|a|b)|hada_w1_a|lokr_w1|dora_scale)(\.|$)"),
    "a ControlNet": _key(r"(control_model\.|controlnet_|input_hint_block\.)"),
    "the UNet of Stable Diffusion, without its VAE": _any(
        _key(r"(model\.diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.\d+\."),
        _key(r"(down_blocks|mid_block|up_blocks)\.(\d+\.)?(attentions|resnets)\.\d+\."),
    ),
    "a diffusion transformer, without its VAE": _key(
        r"(model\.diffusion_model\.|model\.)?"
        r"(double_blocks|single_blocks|joint_blocks|(single_)?transformer_blocks|blocks\.\d+\.(self_attn|cross_attn|attn))\b"
    ),
    "a diffusion model, without its VAE": _key(r"model\.diffusion_model\."),
    "a text encoder": _key(r"(text_model\.|transformer\.text_model\.|cond_stage_model\.|shared\.weight$)"),
    "a language model": _key(r"(model\.|language_model\.)*(layers\.\d+\.self_attn|embed_tokens)\."),
    "an embedding (textual inversion)": _key(r"(emb_params|string_to_param|<.+>|clip_[lg])$"),
    "an upscaler": _key(r"(model\.0\.weight$|conv_first\.|RRDB_trunk\.|body\.0\.rdb1\.)"),
}
"""Files that people keep among autoencoders, or give by mistake."""


def unsupported(shapes: Shapes) -> str | None:
    """What these tensors are, if it is known and there is no network for it."""
    return next((name for name, told in UNSUPPORTED.items() if told(shapes)), None)


def no_vae(shapes: Shapes) -> str | None:
    """What tensors are among which there is no autoencoder, if it is known."""
    return next((name for name, told in NO_VAE.items() if told(shapes)), None)
