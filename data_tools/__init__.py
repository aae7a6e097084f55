"""Athanor's data package: from corpora to packed, verified, memmapped token shards.

Every command is a function of the module that does the work; importing this package imports none of them:

    data_tools.tokenizer_training  make_tokenizer     train a tokenizer on a sample of the inputs
    data_tools.curate              curate             clean documents as a recipe says
    data_tools.prepare             prepare            encode documents into shards, split by split
    data_tools.pack                pack               lay documents into rows of one length
    data_tools.merge               merge              make one dataset of several
    data_tools.interchange         import_tokens      from Megatron, nanoGPT, datatrove, NumPy
    data_tools.interchange         export_tokens      to them
    data_tools.token_shards        open_dataset       read tokens, documents and rows
    data_tools.token_shards        verify_dataset     compare every file with its hash
    data_tools.inspect             describe           the manifest, decoded rows, lengths, as text
    data_tools.inspect             statistics         numbers by split
    data_tools.histograms          draw_histograms    lengths and token frequencies as a picture
    data_tools.stage               stage_dataset      from a URL into a local cache
    data_tools.upload              upload_dataset     to a URL

What is wrong with what they are given is raised as a data_tools.errors.DataToolsError: what was found, what is allowed,
what to change. A function that makes a dataset publishes it whole or not at all, and does nothing where an equal one is
there already. For example:

    from pathlib import Path

    from data_tools.choices import PackMethod
    from data_tools.inspect import statistics
    from data_tools.pack import pack
    from data_tools.prepare import PrepareOptions, prepare
    from data_tools.token_shards import open_dataset, verify_dataset
    from data_tools.tokenizer_design import TokenizerDesign
    from data_tools.tokenizer_training import TrainingRequest, make_tokenizer

    design = TokenizerDesign(vocabulary_size=400, special_tokens=("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
    make_tokenizer(["corpus.jsonl"], TrainingRequest(design=design), Path("tokenizer"))
    prepare(["corpus.jsonl"], Path("tokenizer"), Path("tokens"), PrepareOptions(fractions=(0.9, 0.1)))
    pack(Path("tokens"), Path("packed"), sequence_length=128, method=PackMethod.BEST_FIT)
    assert verify_dataset("packed") == []
    dataset = open_dataset("packed/train")
    row = dataset.row(0, 128)
    print(row.tokens, row.starts, row.used, row.next_token)  # one training row and where documents start in it
    print(statistics(Path("packed"))["train"]["length_percentile_50"])
"""
