"""Make a GGUF: from a Hugging Face folder or from another GGUF, streamed, in the types that recipe.py lists.

The one door is `quantize.convert.convert`. Imports only llamacli.{errors, ggml, gguf, config, kernels} of the engine.

    folder, safetensors -> names, hf_config, vocab, general -> recipe, imatrix -> plan -> sources, encoders -> journal
"""
