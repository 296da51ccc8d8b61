"""Every field that transformers 4.43 and 5 write for the supported families, and what import does with it.

    read         decides what is computed: the function named in the table's comment reads it, and refuses what it must
    fixed        only these values mean what is computed here; others are refused by name
    irrelevant   says nothing about what is computed here, or the weights say it
    not followed  has no effect here, and is named once if it is set

Fields in none of these are named once, too. An absent field and null are the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ross_jax.convert.settings import Settings


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of one kind of file.

    Attributes:
      read: fields that are read.
      fixed: field -> the values that it may have.
      irrelevant: fields that are ignored.
      not_followed: field -> values that need no word; any other is named.
    """

    read: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    not_followed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def check(self, settings: Settings) -> None:
        """Notes a problem for each fixed field with another value."""
        for name, accepted in self.fixed.items():
            settings.only(name, *accepted)

    def knows(self, name: str) -> bool:
        """Whether the field is in the list."""
        return name in self.read or name in self.fixed or name in self.irrelevant or name in self.not_followed

    def ignored(self, values: Mapping[str, Any], where: str) -> list[str]:
        """One line that names the fields of a file that have no effect; empty if there are none."""
        known = {*self.read, *self.fixed, *self.irrelevant}
        names = [
            name
            for name, value in values.items()
            if value is not None and name not in known and value not in self.not_followed.get(name, ())
        ]
        listed = ", ".join(f"{name} {_show(values[name])}" for name in names[:12])
        return [f"{where}: these fields have no effect here: {listed}{', ...' if names[12:] else ''}"] if names else []


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


GENERATION = Fields(  # generation.end_ids
    read=_names(
        """
        eos_token_id
        """
    ),
    # Answers are greedy, without beams, and their length is asked for.
    irrelevant=_names(
        """
        do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff max_length
        max_new_tokens length_penalty early_stopping diversity_penalty bos_token_id pad_token_id
        decoder_start_token_id forced_decoder_ids num_beam_groups use_cache cache_implementation cache_config
        max_cache_len return_legacy_cache low_memory output_attentions output_hidden_states output_scores
        output_logits return_dict_in_generate num_return_sequences renormalize_logits remove_invalid_values
        encoder_repetition_penalty encoder_no_repeat_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule is_assistant assistant_confidence_threshold assistant_early_exit
        assistant_ensemble_weight use_mtp assistant_lookbehind target_lookbehind prompt_lookup_num_tokens
        max_matching_ngram_size compile_config disable_compile continuous_batching_config prefill_chunk_size
        speculation_type _from_model_config _commit_hash transformers_version generation_kwargs max_time
        """
    ),
    not_followed={
        **{"repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "num_beams": (1,), "penalty_alpha": (0.0,)},
        **{"min_length": (0,), "min_new_tokens": (0,), "guidance_scale": (1.0,), "token_healing": (False,)},
        **{"bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "stop_strings": ([],)},
        **{name: () for name in ("force_words_ids", "constraints", "sequence_bias", "dola_layers")},
        **{name: () for name in ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")},
        "watermarking_config": (),
    },
)
_COMMON = _names(
    """
    _name_or_path architectures transformers_version torch_dtype dtype return_dict output_attentions
    output_hidden_states chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix torchscript use_bfloat16 tf_legacy_loss bos_token_id
    pad_token_id sep_token_id decoder_start_token_id tie_encoder_decoder cross_attention_hidden_size
    attn_implementation _attn_implementation _attn_implementation_autoset _commit_hash initializer_range
    initializer_factor use_cache is_decoder max_position_embeddings comment _comment
    """
)
# A config.json of transformers 4 may hold settings of generation; generation_config.json counts.
_COMMON |= GENERATION.irrelevant | GENERATION.not_followed.keys()
_COMMON_FIXED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "attention_dropout": (0.0,),
}
LANGUAGE = Fields(  # language.language_config
    read=_names(
        """
        model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings attention_bias mlp_bias
        rope_theta rope_scaling rope_parameters partial_rotary_factor layer_types use_sliding_window
        sliding_window max_window_layers quantization_config eos_token_id
        """
    ),
    fixed=_COMMON_FIXED,
    irrelevant=_COMMON
    | _names(
        """
        pretraining_tp
        """
    ),
)
VISION = Fields(  # vision.vision_config
    read=_names(
        """
        model_type vision_config hidden_size intermediate_size num_hidden_layers patch_size
        num_attention_heads num_channels image_size hidden_act layer_norm_eps mlp_ratio qkv_bias
        use_swiglu_ffn num_register_tokens
        """
    ),
    fixed={
        **_COMMON_FIXED,
        **{name: (0.0,) for name in ("attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate")},
        "dropout": (0.0,),
    },
    irrelevant=_COMMON
    | _names(
        """
        text_config projection_dim logit_scale_init_value vision_use_head layerscale_value eos_token_id
        out_features out_indices stage_names apply_layernorm reshape_hidden_states use_mask_token
        text_config_dict vision_config_dict tie_word_embeddings encoder_stride
        """
    ),
)
FULL = Fields(  # parts.py, beside the fields of the language model
    read=_names(
        """
        mm_vision_tower mm_pixel_decoder mm_hidden_size mm_projector_type mm_inv_projector_type
        mm_vision_select_layer vision_feature_layer image_aspect_ratio image_mean image_std image_embed_len
        decode_image_size mm_inv_num_heads mm_inv_prediction mm_inv_schedule
        """
    ),
    fixed={
        "mm_use_im_start_end": (False,),
        "mm_patch_merge_type": ("flat",),
        "mm_vision_select_feature": ("patch",),
        "image_aspect_ratio": ("pad", "square", "crop"),
        "s2": (False,),
        "mm_resampler_type": (),
    },
    irrelevant=_names(
        """
        ross_enable use_mm_proj use_mm_inv_proj mm_use_im_patch_token mm_inv_hidden_size mm_projector_lr
        mm_inv_projector_lr mm_vision_tower_lr freeze_mm_mlp_adapter tune_mm_mlp_adapter
        unfreeze_mm_vision_tower tune_mm_vision_resampler mm_tunable_parts tokenizer_model_max_length
        tokenizer_padding_side image_grid_pinpoints image_crop_resolution image_split_resolution
        vision_tower_pretrained pretrain_mm_mlp_adapter use_pos_skipping pos_skipping_range
        mm_newline_position
        """
    ),
)
LLAVA = Fields(  # llava_source.py: config.json of transformers' LLaVA
    read=_names(
        """
        model_type text_config vision_config vision_feature_layer vision_feature_select_strategy
        tie_word_embeddings dtype torch_dtype
        """
    ),
    fixed={
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "quantization_config": (),
    },
    # The tokenizer tells the image's token, and the inner configs all sizes.
    irrelevant=_COMMON
    | _names(
        """
        image_token_index image_token_id image_seq_length ignore_index vocab_size hidden_size eos_token_id
        is_encoder_decoder add_cross_attention pruned_heads attention_dropout
        """
    ),
)
PROCESSOR = Fields(  # parts._read_processor
    read=_names(
        """
        image_mean image_std resample size crop_size do_center_crop
        """
    ),
    fixed={
        "do_resize": (True,),
        "do_rescale": (True,),
        "rescale_factor": (1 / 255,),
        "do_normalize": (True,),
        "do_pad": (False,),
        "do_flip_channel_order": (False,),
        "max_num_patches": (),  # SigLIP 2 of variable resolution
    },
    # Every image becomes RGB, of one size.
    irrelevant=_names(
        """
        do_convert_rgb image_processor_type feature_extractor_type processor_class _processor_class
        default_to_square data_format input_data_format return_tensors device disable_grouping
        _valid_processor_keys auto_map pad_size do_reduce_labels transformers_version image_seq_length
        patch_size
        """
    ),
)
TOKENIZER = Fields(  # transformers reads tokenizer_config.json; data.tokenizer and data.chat_template use the result
    read=_names(
        """
        tokenizer_class added_tokens_decoder bos_token eos_token unk_token pad_token chat_template
        additional_special_tokens extra_special_tokens model_specific_special_tokens legacy add_bos_token
        add_prefix_space model_max_length sep_token cls_token mask_token
        """
    ),
    fixed={
        "add_eos_token": (False,),  # training puts an end behind answers only
        "sp_model_kwargs": ({},),  # sampled pieces, and others that change ids
    },
    # Text is encoded as text whatever split_special_tokens says; batches are padded and cut elsewhere; transformers
    # cleans up no spaces of byte-pair encodings.
    irrelevant=_names(
        """
        split_special_tokens padding_side truncation_side model_input_names name_or_path is_local padding
        truncation max_length stride pad_to_multiple_of pad_token_type_id use_fast truncation_strategy
        special_tokens_map_file processor_class from_slow transformers_version auto_map init_inputs device_map
        local_files_only clean_up_tokenization_spaces spaces_between_special_tokens errors tokenizer_file backend
        bos_token_id fix_mistral_regex use_default_system_prompt
        """
    ),
)
FILES = {"generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}
"""Files beside config.json whose fields import looks at, besides the processor's."""
