#!/usr/bin/env python3
"""Download the tokenizer of a model from the Hugging Face hub, without its weights.

    python scripts/download_tokenizer.py meta-llama/Llama-3.1-8B --hf_token hf_...

writes assets/hf/Llama-3.1-8B/ with tokenizer.json and the files that name its begin and end tokens; then train with

    ./run_train.sh --model.hf_assets_path assets/hf/Llama-3.1-8B

Some models ask for a token of an account that accepted their licence; HF_TOKEN in the environment serves as well.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.runtime.errors import UserError

REQUIRED = "tokenizer.json"
OPTIONAL = ("tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json")


def download(repo_id: str, folder: Path, token: str | None) -> None:
    """Fetch the files of a repository into `folder` and check that they make a tokenizer.

    Raises:
        UserError: the repository cannot be reached, holds no `tokenizer.json`, or holds a broken one.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    folder.mkdir(parents=True, exist_ok=True)
    for name in (REQUIRED, *OPTIONAL):
        try:
            huggingface_hub.hf_hub_download(repo_id, name, local_dir=folder, token=token)
        except GatedRepoError as error:
            page = f"https://huggingface.co/{repo_id}"
            raise UserError(f"{repo_id} needs its licence accepted at {page}, and then --hf_token") from error
        except RepositoryNotFoundError as error:
            raise UserError(f"{repo_id}: no such repository, or a private one without --hf_token") from error
        except EntryNotFoundError as error:
            if name == REQUIRED:
                raise UserError(
                    f"{repo_id} holds no {REQUIRED}; take the repository in Hugging Face's format"
                ) from error
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{repo_id}: cannot download {name}: {error}") from error
    tokenizer = build_tokenizer(str(folder))
    print(f"{folder}: {tokenizer.vocab_size} codes, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description="Download a tokenizer from the Hugging Face hub, without the weights.")
    parser.add_argument("repo_id", help="repository, such as meta-llama/Llama-3.1-8B")
    parser.add_argument("--local_dir", default="assets/hf", help="a folder for the model is made in here (%(default)s)")
    parser.add_argument("--hf_token", default=os.environ.get("HF_TOKEN"), help="access token (default: $HF_TOKEN)")
    options = parser.parse_args(argv)
    try:
        download(options.repo_id, Path(options.local_dir) / options.repo_id.split("/")[-1], options.hf_token)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
