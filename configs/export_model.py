"""The primary adapter merged into the original base, for engines that load whole models."""

from nli.export import ExportConfig

config = ExportConfig(
    model="models/reflected",
    form="merged_bf16",  # merged_nf4 adds to what the adapter was trained on
    output_dir="models/reflected-merged",
    check_rows=100,
)
