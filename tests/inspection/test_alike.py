from mixq_compile.inspection.alike import group_alike


def test_layers_that_differ_by_their_number_only_share_a_line() -> None:
    groups = group_alike({f"model.layers.{number}.up": "same" for number in range(3)} | {"head": "same"})
    assert [group.label for group in groups] == ["model.layers.*.up ×3", "head"]


def test_layers_with_other_properties_have_a_line_of_their_own() -> None:
    groups = group_alike({"layers.0.up": "odd", "layers.1.up": "same", "layers.2.up": "same"})
    assert [(group.pattern, group.fqns) for group in groups] == [
        ("layers.0.up", ("layers.0.up",)),
        ("layers.*.up", ("layers.1.up", "layers.2.up")),
    ]


def test_numbers_within_a_word_stay() -> None:
    (group,) = group_alike({"block.0.conv1d": "", "block.1.conv1d": ""})
    assert group.pattern == "block.*.conv1d"
