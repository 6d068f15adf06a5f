"""Everyday words that needle keys are made of; no two of one list are alike."""

from __future__ import annotations

_ADJECTIVES = """
    able amber ancient basic bitter blunt bold brave brief bright calm candid careful cheap
    clean clever cloudy coastal copper crisp curious daring distant dusty eager early
    elegant fancy fertile fierce firm fluffy foggy fragile frosty gentle giant golden grumpy
    hasty hollow honest humble icy idle jolly kind lazy little lively lonely loud lucky
    mellow mighty modest narrow neat noble nimble odd patient plain polite proud quiet rapid
    rare rough royal rural rusty salty secret shallow sharp silent silver simple sleepy slim
    smooth solid spicy steady stormy sturdy sudden sunny swift tender thirsty tidy tiny
    tough urban vast vivid warm weary wild wise witty young zesty
"""

_NOUNS = """
    acorn anchor apron arrow badge bakery banjo barrel basket beacon beaver blanket bottle
    bridge bucket button cabin camel candle canoe carpet castle cellar cherry clock cloud
    compass copper cottage cradle cricket curtain desert dolphin donkey dragon drum eagle
    engine falcon feather fiddle forest fountain garden garlic ginger glacier goblet guitar
    hammer harbor harvest hazel helmet hermit island jacket jungle kettle kitten ladder
    lantern lemon library lizard magnet maple marble meadow mirror monkey mountain needle
    nutmeg oasis orchard otter oyster paddle parrot pebble pencil pepper piano pillow planet
    pocket pumpkin puzzle rabbit ribbon river rocket saddle sailor saucer scarf shelter
    spider squirrel statue stream tailor teapot thunder ticket tiger timber tower trumpet
    tunnel turtle valley velvet village violin walnut whistle willow window
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
