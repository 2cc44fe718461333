"""Make a GGUF: from a Hugging Face folder or from another GGUF, streamed, in the types that recipe.py lists.

`quantize.convert.convert` is the entry point. Of llamacli it imports only errors, files, llama4 and cpu.kernels.

    folder, safetensors -> names, hf_config, vocab, general -> recipe, imatrix -> plan -> pieces, sources, encoders -> journal
"""
