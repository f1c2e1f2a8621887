"""The untrained parts of the bundled pipeline: the blocks of Stable Diffusion, at a fraction of its size."""

import json

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_distill.data import scenes

PRETRAINED = 2  # version of the stages of pretraining, part of the keys of their folders: raise it when they change
PROMPT_LENGTH = 36  # tokens; the longest caption has 35, start and end included


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
    """A CLIP tokenizer with byte pairs learnt from the captions: every word in them is one token.

    The same captions give the same numbers. The trainer alone would number the last letters of words, and so break
    ties between pairs, in the order of a hash that is another one in each process.
    """
    backend = CLIPTokenizer().backend_tokenizer
    special, letters = ["<|startoftext|>", "<|endoftext|>"], sorted(ByteLevel.alphabet())
    ends = sorted({f"{word[-1]}</w>" for word in _words(backend, captions)})
    trainer = BpeTrainer(
        vocab_size=2_000,  # more than needed: training stops when every word is one token
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=[*special, *ends],  # as these they have their numbers before the trainer gives any
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*special, *letters, *ends, *("".join(merge) for merge in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


def _words(backend: Tokenizer, captions: list[str]) -> set[str]:
    """The words of captions as byte pairs are learnt from: normalised, their bytes as letters."""
    split = backend.pre_tokenizer.pre_tokenize_str
    return {word for text in set(captions) for word, _ in split(backend.normalizer.normalize_str(text))}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as token ids, padded to the encoder's length: (n, tokens)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt")
    return tokens.input_ids
