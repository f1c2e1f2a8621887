"""The untrained parts of the bundled pipeline: the blocks of Stable Diffusion, at a fraction of its size."""

import json

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_distill.data import scenes

PROMPT_LENGTH = 24  # tokens; the longest caption has 16, start and end included


def build_vae() -> AutoencoderKL:
    """A VAE with scale factor 8 and four latent channels, as in Stable Diffusion; a thirtieth of its parameters."""
    return AutoencoderKL(
        sample_size=scenes.IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A small conditional UNet for latents (4, 8, 8), of the blocks of Stable Diffusion."""
    return UNet2DConditionModel(
        sample_size=scenes.IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads: diffusers keeps the wrong name of SD 1.5's config
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction and a sampler that starts from the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder for the vocabulary of the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer with byte pairs learnt from the captions: every word in them is one token."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2_000,  # more than needed: training stops when every word is one token
        end_of_word_suffix="</w>",
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PROMPT_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as token ids, padded to the encoder's length: (n, tokens)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt")
    return tokens.input_ids
