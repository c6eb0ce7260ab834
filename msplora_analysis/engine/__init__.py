"""Work on many adapters: processes, Dask, the cache, and the results that travel between them."""
