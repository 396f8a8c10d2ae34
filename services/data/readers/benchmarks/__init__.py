"""Published benchmarks of questions, each in the form of its own files, as items that carry what scores them."""

from services.data.readers.benchmarks.reader import BENCHMARKS, BenchmarkReader, protocol

__all__ = ["BENCHMARKS", "BenchmarkReader", "protocol"]
