"""The game: what the board says and shows, its levels, and whom one plays against."""

import re

import pandas as pd
import pytest
import torch
from figures import five_minutes, game
from long_runs import every_network as every
from long_runs import levels as game_levels
from long_runs.levels import Level, Ranks, Rivals
from torch.utils.data import TensorDataset

from cnn_pruning import CNN, evaluate, mask_filters

ALL = {(0, k) for k in range(every.FIRST)} | {(1, k) for k in range(every.SECOND)}


def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (5,), generator=generator))


DATA = dataset()


@pytest.fixture(scope="module")
def losses():
    """Of a network as initialized, but with larger weights, so that its filters matter."""
    torch.manual_seed(0)
    network = CNN(every.CHANNELS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    return game.Losses(network.eval(), *DATA.tensors)


@pytest.fixture(scope="module")
def everything(losses):
    return every.all_losses(losses.network, *DATA.tensors)


def some_places(generator):
    on = {place for place in sorted(ALL) if torch.rand((), generator=generator) < 0.5}
    return on | {(0, 3), (1, 7)}


def rivals(losses, loss, best):
    """Networks of which Taylor's has this loss, and the best that of ``best``."""
    of = (losses.outcome(best)[0], 9.0)
    return Rivals("with some filters", Ranks(1000, (1, 1000), of), ALL, loss, best)


BEST = ALL - {(1, 4), (1, 9)}


@pytest.fixture
def board(losses, monkeypatch):
    """Keep 22 and beat Taylor easily; 20 within 3 clicks; 22, where nobody can beat Taylor."""
    monkeypatch.setattr(game, "PERSONAL_BEST", {})
    easy = rivals(losses, 100.0, BEST)
    hard = rivals(losses, -1.0, BEST)
    levels = [Level("easy", easy, 22), Level("hurry", easy, 20, clicks=3), Level("hard", hard, 22)]
    images = {"a": DATA.tensors[0][0], "b": DATA.tensors[0][1]}
    by_size = {size: easy for size in range(2, every.K + 1)}
    return game.Board(losses, by_size, levels, images)


def press(widget):
    widget._click_handlers(widget)


def off(board, *places):
    for place in places:
        press(board.cards[place])
    return board.words.value


def test_the_loss_and_the_accuracy_are_those_of_the_masked_network(losses):
    generator = torch.Generator().manual_seed(1)
    for on in (ALL, *(some_places(generator) for _ in range(5))):
        removed = {
            layer: [k for i, k in ALL - on if i == number]
            for number, layer in enumerate(every.LAYERS)
        }
        with mask_filters(losses.network, removed):
            expected = evaluate(losses.network, DATA)
        assert losses.outcome(on) == pytest.approx(expected, abs=1e-5)


def test_a_rank_rises_with_the_loss_and_is_exact_where_it_is_stored():
    number = 100_000
    losses = torch.linspace(0.2, 3, number, dtype=torch.float64).square()
    stored = every.stored_ranks(number)
    ranks = Ranks(number, stored, [losses[r - 1].item() for r in stored])
    for rank in stored[:32]:
        assert ranks.rank(losses[rank - 1].item()) == (rank, True)
    found = [ranks.rank(loss)[0] for loss in torch.linspace(0, 9.1, 500).tolist()]
    assert found == sorted(found)
    assert found[0] == 1 and found[-1] == number
    for rank in (50, 500, 50_000):
        assert ranks.rank(losses[rank - 1].item())[0] == pytest.approx(rank, rel=0.05)


def test_the_ranks_within_a_budget_are_close_to_those_among_all_such_networks(everything):
    first, second = every.widths()
    allowed = (first > 0) & (second > 0) & (every.macs_of(first, second) <= every.macs_of(4, 8))
    among = everything[allowed].sort().values
    pairs = pd.DataFrame(every.rows_of_pairs(0, everything))
    pairs["best"] = pairs.best.map(every.text_of)
    pairs = pairs[(pairs["first"] > 0) & (pairs.second > 0)]
    whole = every.text_of(2**every.K - 1)
    small = every.text_of(every.subset_of({"network.0": [2], "network.2": [3]}))
    taylor = pd.DataFrame({"subset": {24: whole, 2: small}, "loss": {24: 0.1, 2: 7.0}})
    found = game_levels.within(every.macs_of(4, 8), pairs, taylor)
    assert found.ranks.of == len(among)
    assert found.best_loss == pytest.approx(among[0].item(), abs=1e-5)
    assert (found.taylor, found.taylor_loss) == ({(0, 2), (1, 3)}, 7.0)
    for share in (1e-4, 0.01, 0.3, 0.9):
        rank = int(share * len(among))
        assert rank / 2 < found.ranks.rank(among[rank - 1].item())[0] < 2 * rank


@pytest.mark.parametrize("seed", every.SEEDS[:3])
def test_taylor_and_the_best_of_a_level_are_networks_that_may_compete(seed):
    by_size, levels = game_levels.levels(seed)
    assert [*by_size] == [*range(2, every.K + 1)]
    for level in levels:
        for kept in (level.rivals.taylor, level.rivals.best):
            widths = [sum(i == layer for i, _ in kept) for layer in (0, 1)]
            assert not level.missing(*widths)
            assert level.missing(8, 16)
        assert level.rivals.best_loss <= level.rivals.taylor_loss
    for size, each in by_size.items():
        assert len(each.taylor) == len(each.best) == size
        assert each.ranks.of == every.number_of(size)


def test_a_click_on_a_card_switches_its_filter_off_and_the_next_one_on_again(board):
    before = board.words.value
    card = board.cards[1, 3]
    said = off(board, (1, 3))
    assert card.description == "3 off" and "is off" in card.tooltip
    assert "game-off" in card._dom_classes
    assert said != before and f"{board.losses.outcome(ALL - {(1, 3)})[0]:.4f}" in said
    off(board, (1, 3))
    assert card.description == "3 on" and "game-off" not in card._dom_classes
    assert board.on == ALL and "Clicks: 2." in board.words.value


def test_undo_takes_back_one_click_after_the_other_and_counts(board):
    off(board, (0, 1), (1, 2))
    press(board.undo)
    assert board.on == ALL - {(0, 1)}
    press(board.undo)
    assert board.on == ALL and board.undo.disabled
    assert "Clicks: 4." in board.words.value
    press(board.again)
    assert "Clicks: 0." in board.words.value


def test_who_beats_taylor_is_told_so_and_remembered(board):
    assert "You beat Taylor" not in off(board, (0, 0))
    assert "You beat Taylor" in off(board, (0, 2))
    first = board.losses.outcome(board.on)[0]
    (known,) = game.PERSONAL_BEST.values()
    assert known == (first, 2)
    press(board.again)
    said = off(board, (1, 4), (1, 9))
    best = board.losses.outcome(BEST)[0]
    assert "the best of all" in said
    (known,) = game.PERSONAL_BEST.values()
    assert known[0] == min(first, best)


def test_a_best_is_told_for_its_own_network_and_level_alone(board, losses):
    off(board, (0, 0), (0, 2))
    easy, hurry, _ = (level for _, level in board.level.options)
    assert "Your best" in game.personal_best(easy)
    assert game.personal_best(hurry) == ""
    other = rivals(losses, 100.0, ALL - {(0, 0), (0, 1)})  # that of another network
    assert game.personal_best(Level("easy", other, 22)) == ""


def test_who_loses_is_not_told_that_they_won(board):
    board.level.index = 2
    assert "Taylor still wins" in off(board, (0, 0), (0, 2))
    assert game.PERSONAL_BEST == {}


def test_each_level_keeps_its_own_board(board):
    said = off(board, (0, 1), (1, 2))
    board.level.index = 1
    assert board.on == ALL and board.undo.disabled and "Clicks: 0 of 3." in board.words.value
    off(board, (1, 5))
    board.level.index = 0
    assert board.on == ALL - {(0, 1), (1, 2)} and board.words.value == said
    assert [p for p, card in board.cards.items() if "off" in card.description] == [(0, 1), (1, 2)]
    press(board.undo)
    assert board.on == ALL - {(0, 1)}
    press(board.again)
    assert board.on == ALL and "Clicks: 0." in board.words.value
    board.level.index = 1
    assert board.on == ALL - {(1, 5)} and "Clicks: 1 of 3." in board.words.value
    board.level.index = 0
    assert board.on == ALL and "Clicks: 0." in board.words.value


def test_who_saw_the_best_of_a_level_has_seen_it_when_they_come_back(board):
    board.best.value = True
    board.level.index = 1
    assert not board.best.value  # nor does it show the best of another level
    board.level.index = 0
    assert not board.best.value
    assert "not with the best outlined" in off(board, (1, 4), (1, 9))
    assert game.PERSONAL_BEST == {}
    board.level.index = 1
    assert "You beat Taylor" not in off(board, (0, 0), (0, 1))
    assert "No click is left" in off(board, (0, 2))


def test_outlines_leave_the_player_s_choice_alone_and_the_best_ends_the_contest(board):
    off(board, (1, 4))
    board.taylor.value = True
    assert board.on == ALL - {(1, 4)}
    assert "game-taylor" in board.cards[0, 0]._dom_classes
    assert "Taylor keeps it" in board.cards[0, 0].tooltip
    board.best.value = True
    assert board.on == ALL - {(1, 4)}
    assert ("game-best" in board.cards[1, 9]._dom_classes) is False
    assert "You beat Taylor" not in off(board, (1, 9))
    board.best.value = False
    assert game.PERSONAL_BEST == {}
    press(board.again)
    assert "You beat Taylor" in off(board, (1, 4), (1, 9))


def test_after_the_last_click_no_card_can_be_clicked(board):
    board.level.index = 1
    assert not board.cards[0, 0].disabled
    assert "No click is left" in off(board, (0, 0), (0, 1), (0, 2))
    assert all(card.disabled for card in board.cards.values()) and board.undo.disabled
    press(board.again)
    assert not any(card.disabled for card in board.cards.values())


def test_the_cards_show_another_image_and_what_is_seen_through_the_first_layer(board):
    shown = [board.maps.value]
    press(board.another)
    shown.append(board.maps.value)
    off(board, (0, 5))
    shown.append(board.maps.value)
    assert len({*shown}) == 3


def test_a_layer_without_filters_is_said_to_be_no_network(board):
    said = off(board, *((0, k) for k in range(every.FIRST)))
    assert "no network" in said and not board.bar.value


def test_the_bar_is_full_for_the_best_and_empty_for_the_worst(losses):
    each = rivals(losses, 5.0, ALL)
    assert "class='game-you' style='width: 100.0%'" in game.ladder(each, 1)
    assert "class='game-you' style='width: 0.0%'" in game.ladder(each, 1000)
    assert "class='game-you' style='width: 66.7%'" in game.ladder(each, 10)


MAPS = {"network.0": torch.ones(3, 2, 2), "network.2": torch.ones(4, 2, 2)}
MAPS["network.2"][1] = 0  # it sees nothing
REMOVED = [{}, {"network.0": [2], "network.2": []}, {"network.0": [2], "network.2": [0, 1]}]
REMOVED[0] = {layer: [] for layer in MAPS}


@pytest.fixture
def slider():
    """Of a network with 3 and 4 filters, of which the first three positions are known."""
    row = {"accuracy": 0.9, **dict.fromkeys(five_minutes.COUNTS, 1)}
    measured = [{**row, "accuracy": 0.9 - n / 10} for n in range(3)]
    return five_minutes.pruning_slider(MAPS, REMOVED, measured, lambda n: iter((0.5, 0.6)))


def parts(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def listened_to(widget):
    """The widgets whose element a screen reader is to listen to."""
    return [part for part in parts(widget) if "announced" in part._dom_classes]


def test_the_element_that_a_screen_reader_listens_to_is_not_made_anew(board, slider):
    """It is the widget's own: in its value, which replaces all within, there is no other."""
    (words,) = listened_to(board.widget)
    assert words is board.words
    values = [words.value, off(board, (0, 1)), board.goal.value, board.bar.value]
    stack, trained = listened_to(slider)
    assert len(stack.children) == len(REMOVED)
    assert "Accuracy 80.0%" in stack.children[1].value
    values += [child.value for child in stack.children]
    press(next(part for part in parts(slider) if "Train" in getattr(part, "description", "")))
    assert "60.0% after one epoch" in trained.value
    for value in [*values, trained.value]:
        assert not any(role in value for role in ("role='status'", "role='alert'", "aria-live"))
    for value in (values[0], values[1], stack.children[2].value, trained.value):
        assert value.endswith(game.announced(""))


def test_only_what_a_click_changes_is_read_to_the_player(board):
    for said in (board.words.value, off(board, (0, 1))):
        assert "Goal" not in said and "game-ladder" not in said
    assert "Goal" in board.goal.value and "game-ladder" in board.bar.value


@pytest.mark.parametrize("n", range(3))
def test_removed_cards_are_crossed_out_and_dead_ones_say_so(slider, n):
    value = next(part for part in parts(slider.children[2].children[n]) if hasattr(part, "value"))
    layers = value.value.split("<div class='slide-cards'>")[1:]
    for layer, html in zip(MAPS, layers, strict=True):
        cards = re.findall(r"<div class='([^']*)'>(.+?)</div>", html)
        assert len(cards) == len(MAPS[layer])
        crossed = [k for k, (style, _) in enumerate(cards) if style == "slide-gone"]
        assert crossed == REMOVED[n][layer]
        assert [k for k, (_, seen) in enumerate(cards) if "sees nothing here" in seen] == [
            k for k, seen in enumerate(MAPS[layer]) if not seen.any()
        ]
    assert game.CROSS in five_minutes.STYLE.split(".slide-gone::after")[1].split("}")[0]
