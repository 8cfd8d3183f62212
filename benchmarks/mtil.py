"""MTIL: the published protocol on the real data sets, for whoever has them and a ViT-B/16.

python -m benchmarks.mtil --root DIR [--model ViT-B-16 --pretrained openai] [--seeds 0 1 2]
"""

from benchmarks.published.protocol import main

if __name__ == "__main__":
    main("mtil")
