"""A transformers model with a packed cache: the same text, a fraction of the memory.

    python examples/python/transformers_generate.py [FOLDER_OF_A_MODEL]

Without a folder: a tiny model with random weights, to see it run.
"""

import sys

import torch
import transformers

import kvmix
from kvmix.transformers import KVmixCache, model_shape, use_kvmix


def load():
    if len(sys.argv) > 1:
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        inputs = tokenizer("The tide comes in", return_tensors="pt")
        return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]), inputs, tokenizer.decode
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(3, 99, (1, 600))}, list


model, inputs, decode = load()
use_kvmix(model)
shape = model_shape(model)
for bits in (16, 4):
    plan = kvmix.Plan.uniform(shape, bits, bits)
    cache = KVmixCache(plan, model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
    print(f"{bits:2} bits, {cache.pages.memory()['total_bytes']} bytes:", decode(output[0, -20:].tolist()))
