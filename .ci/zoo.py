"""The zoo: every family of causal language models that transformers has, through every script (slow).

    python .ci/zoo.py                  # about 5 minutes of an idle core; no part of test_all.py
    python .ci/zoo.py llama gpt2       # those alone

A tiny random model of each family is saved, then unlearned, attacked and scored as a user would. Each ends
well, or with one line of error that REFUSED foretells; data/README.md has the table.
"""
import re
import shutil
import sys
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from test_all import Folder, run_here, write_world

import torch

SIZES = {                             # value -> the fields of a config that take it, where it has them
    41: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    64: "max_position_embeddings n_positions max_seq_len original_max_position_embeddings mamba_d_ssm",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff "
        "intermediate_size_mlp shared_intermediate_size dense_intermediate_size",
    32: "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim lru_width "
        "attention_hidden_size input_embedding_size output_embedding_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size kv_lora_rank "
        "q_lora_rank moe_shared_expert_intermediate_size hidden_size_per_layer_input o_lora_rank "
        "qk_head_dim",
    8: "head_dim swa_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim "
       "linear_key_head_dim linear_value_head_dim linear_head_dim rotary_dim index_head_dim "
       "mamba_d_head mamba_head_dim mamba_headdim mamba_n_heads mamba_num_heads sliding_window "
       "sliding_window_size chunk_size mamba_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "attention_heads swa_num_attention_heads num_query_groups num_experts n_routed_experts "
       "num_local_experts moe_num_experts",
    3: "image_token_id video_token_id audio_token_id image_token_index",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
       "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
       "num_experts_per_token moe_k moe_topk linear_num_key_heads linear_num_value_heads "
       "linear_num_heads index_n_heads eos_token_id",
    1: "n_group topk_group n_groups num_expert_group o_groups first_k_dense_replace n_shared_experts "
       "bos_token_id",
    0: "pad_token_id"}
LOCAL = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
SHARED = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
          "attention_hidden_size": 64, "attention_head_dim": 16}
MORE = {                              # fields whose values hang together
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}},
    "dory": {"num_hidden_layers": 4, "layer_types": LOCAL * 2, "n_input_layers": 1,
             "n_recurrent_layers": 2, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": LOCAL * 2},
    "granitemoehybrid": {"layer_types": LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 64, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {"shape_vocab_size": 41, "pronunciation_vocab_size": 41, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**SHARED, "n_mamba_heads": 2},
    "zamba2": {**SHARED, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1}}
LEFT_OUT = {                          # what transformers 5.24 itself does not do here
    "blt": "the sizes of its four parts hang together",
    "dots3_note": "the sizes of its layers hang together",
    "dots3_note_text": "the sizes of its layers hang together",
    "emu3": "AutoModelForCausalLM does not read back what it saves",
    "mllama": "AutoModelForCausalLM does not read back what it saves",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, whose states it needs",
    "gemma4_unified_assistant": "drafts for another model, whose states it needs",
    "musicgen": "writes music",
    "musicgen_melody": "writes music",
    "qwen4_exp": "is qwen4_exp_text",
    "reformer": "has a gradient in train() only, where it drops out"}
AHEAD = {"unlearn": "depends on the tokens after it"}
BY_IDS = {"evaluate --attack": "does not run on embeddings in the place of tokens"}
REFUSED = {                           # family -> {job: part of its one line of error}
    "cpmant": AHEAD,                  # its prompt attends to itself in both directions
    "xlm": AHEAD,
    "xlnet": AHEAD,
    "prophetnet": {"unlearn": "one state a token"},     # it predicts two tokens ahead, from two streams
    "deepseek_v4": BY_IDS,            # its first experts go by the ids of tokens
    "gemma3n_text": BY_IDS,           # four states a token
    "hy_v4": BY_IDS,                  # four states a token
    "moshi": BY_IDS}                  # an embedding more than it has outputs
BELOW_HALF = {                        # percent of the weights in layers that --lora and --quantize reach
    "dbrx": 14,                       # its experts are 2-D parameters of their own
    "gemma3": 47, "git": 44, "got_ocr2": 17,            # and what reads images and sound has tables
    "moss_transcribe_diarize": 36, "phi4_multimodal": 11}
PREFIX = ("--attack prefix --attack_calls 30 --attack_questions 2 --attack_length 3 5 "
          "--attack_candidates 4 --attack_topk 8 --attack_answer 3")
JOBS = {                              # {run}: what the first one writes
    "unlearn": "unlearn.py --out {run}",
    "unlearn --lora": "unlearn.py --out {run}-lora --lora 2",
    "relearn": "relearn.py {run} --samples 4 --seeds 1",
    "relearn --lora": "relearn.py {run} --samples 4 --seeds 1 --lora 2",
    "relearn --quantize --prune": "relearn.py {run} --quantize 4 --prune 10",
    "evaluate": "evaluate.py {run}",
    "evaluate --show": "evaluate.py {run} --show 2",
    "evaluate --attack": "evaluate.py {run} " + PREFIX}


def zoo_config(kind, **more):
    """A config with SIZES in the place of its own; two layers, or one of every kind that is default."""
    from transformers import PretrainedConfig
    fields = vars(kind())
    values = {}
    for value, names in SIZES.items():
        for name in names.split():
            if name in fields:
                values[name] = value
    if "is_decoder" in fields:
        values["is_decoder"] = True   # or it is an encoder, which is refused
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]
    kinds = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        different = list(dict.fromkeys(fields.get(name) or []))
        if len(different) > 1:
            kinds[name] = different
    depth = max(map(len, kinds.values()), default=2)
    for name, different in kinds.items():
        values[name] = (different * depth)[:depth]
    if "num_hidden_layers" in fields:
        values["num_hidden_layers"] = depth
    for name, part in fields.items():
        if isinstance(part, PretrainedConfig):
            values[name] = zoo_config(type(part)).to_dict()
    return kind(**values | more)


class Zoo(Folder):
    """One test, a family after the other; REFUSED and BELOW_HALF say what is not as one would expect."""
    only = []                          # families on the command line

    def outcome(self, family):
        """({job: its line of error}, percent of the weights that edits reach) of a random model."""
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        torch.manual_seed(0)
        config = zoo_config(CONFIG_MAPPING[family], **MORE.get(family, {}))
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)      # far enough from chance to have gradients
        world = list(map(str, write_world(self.tmp / family, model)))
        refused = {}
        covered = None
        for name, job in JOBS.items():
            flags = job.format(run=self.tmp / f"{family}-run").split()
            if flags[0] == "unlearn.py":
                flags += world + ["--steps", "2"]
            status, out, err = run_here(*flags)
            if status:
                lines = err.splitlines()
                self.assertEqual((status, lines[-1][:7]), (2, "error: "), (name, err))
                refused[name] = lines[-1]
            if name == "unlearn" and status:                     # the others have nothing to read
                break
            for percent in re.findall(r"compress: on (\d+)%", out):
                covered = int(percent)
        return refused, covered

    def test_every_family_goes_through_every_script_or_is_refused_in_one_line(self):
        from transformers.models.auto import modeling_auto, tokenization_auto
        replaced = "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"        # of Qwen's, that would be ours
        self.enterContext(mock.patch.object(tokenization_auto, replaced, set()))
        families = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        self.assertLessEqual({*self.only}, {*families} - {*LEFT_OUT})
        for family in self.only or families:
            if family in LEFT_OUT:
                continue
            print(family, end=" ", file=sys.stderr, flush=True)
            with self.subTest(family):
                refused, covered = self.outcome(family)
                want = REFUSED.get(family, {})
                self.assertEqual(refused.keys(), want.keys(), refused)
                for name, why in want.items():
                    self.assertIn(why, refused[name])
                if "unlearn" not in refused:
                    self.assertTrue(50 <= covered <= 100 or covered == BELOW_HALF.get(family), covered)
            shutil.rmtree(self.tmp)
            self.tmp.mkdir()


if __name__ == "__main__":
    Zoo.only = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
