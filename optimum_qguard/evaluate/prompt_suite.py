"""Ninety-six prompts, eight in each of twelve categories, and how well a model predicts each of them.

For comparisons prompt by prompt: a model's perplexity on one text says little about where it was harmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_SUITE: Mapping[str, tuple[str, ...]] = {
    "code generation": (
        "Write a Python function that takes a list of integers and returns the second largest distinct value.",
        "Implement a queue in JavaScript that uses two stacks inside, and explain why operations are cheap on average.",
        "Write an SQL query that lists every customer who placed more than three orders in the last thirty days.",
        "Create a shell script that renames all files ending in .jpeg so that they end in .jpg instead.",
        "Write a C function that reverses a string in place without allocating memory, and handle the empty string.",
        "Show me a regular expression that matches a date such as 2024-05-17, and describe what each part of it does.",
        "Write a recursive function in Java that counts the leaves of a binary tree, and add a short comment to it.",
        "Define a small HTML page with a heading, a paragraph and a button that shows a greeting when it is clicked.",
    ),
    "mathematical reasoning": (
        "A train leaves at nine in the morning and travels 180 kilometres in two hours. What is its average speed?",
        "If three pencils and two erasers cost 2.40, and one pencil costs 0.50, how much does a single eraser cost?",
        "The sum of two numbers is 31 and their difference is 7. Find both numbers, and show every step.",
        "A rectangle is twice as long as it is wide, and its perimeter is 36 centimetres. What is its area?",
        "Prove that the sum of the first n odd numbers is equal to n squared, using induction.",
        "A shop lowers a price of 80 by a quarter and then raises it by ten percent. What does the article cost now?",
        "How many different ways are there to arrange the letters of the word LEVEL in a row?",
        "Solve the equation 3x + 5 = 2(x - 4) + 20 for x, and check the solution by putting it back in.",
    ),
    "summarization": (
        "Summarize in one sentence: The council met on Tuesday and, after a long debate, voted to rebuild the old "
        "bridge instead of replacing it with a tunnel.",
        "Give the main point of this note: The delivery was late because the road was flooded, but all of the "
        "parcels arrived dry and nobody has complained.",
        "Shorten this paragraph to ten words: Bees carry pollen from flower to flower, and without them many "
        "of the fruits that we eat would not grow.",
        "What is the gist of the following? Although sales fell in spring, the company hired more people, expecting "
        "that demand would return in autumn.",
        "Write a headline for this story: A retired teacher found a painting in her attic that turned out to be "
        "three hundred years old.",
        "List the two most important facts: The museum opens at ten, entry is free on Sundays, and the garden behind "
        "it is closed in winter.",
        "Condense this email: Thanks for your patience. Our technician can come on Thursday or Friday; please tell us "
        "by Wednesday which day suits you.",
        "Summarize for a child: Volcanoes form where melted rock from deep inside the earth finds a way up through the "
        "crust and flows out.",
    ),
    "translation": (
        "Translate into French: The library closes at six o'clock, but you can return books through the slot at night.",
        "Translate the following sentence into Spanish: My sister has lived in this village since she was a child.",
        "How do you say in German: Could you please tell me which platform the next train to Hamburg leaves from?",
        "Translate this Italian sentence into English: Domani mattina andiamo al mercato per comprare pane, formaggio "
        "e frutta.",
        "Put this French sentence into English: Il fait trop froid pour nager, mais nous pouvons marcher le long de la "
        "plage.",
        "Translate into Portuguese and keep the polite tone: We would be glad to welcome you to our house next week.",
        "Give the English meaning of the German saying: Wer anderen eine Grube gräbt, fällt selbst hinein.",
        "Translate into Dutch: The weather was so good that we decided to have dinner outside under the apple trees.",
    ),
    "logic": (
        "All roses are flowers, and some flowers fade quickly. Does it follow that some roses fade quickly? Explain.",
        "Anna is taller than Ben, and Ben is taller than Clara. Who is the shortest of the three, and how do you know?",
        "If it rains, the street gets wet. The street is not wet. What can be concluded about the rain, and why?",
        "Three boxes are labelled apples, oranges and both, and every label is wrong. From which box do you take one "
        "fruit to find out everything?",
        "A man says that he always lies. Can this sentence be true? Can it be false? Discuss both cases.",
        "Five friends sit in a row. Tom is next to Eve, and Eve is at the left end. On which seat is Tom?",
        "What is the next number in the sequence 2, 6, 12, 20, 30, and which rule produces it?",
        "Either the key is in the drawer or it is in the coat. It is not in the drawer. Where must the key be?",
    ),
    "common sense": (
        "Why do people usually put milk into the refrigerator after they come home from the supermarket?",
        "You pour water into a glass until it is full and then drop in a stone. What happens, and why?",
        "Is it a good idea to carry an umbrella on a day without clouds? Say what it depends on.",
        "Someone left the window open during a storm. What will the floor beneath the window probably look like?",
        "Which of these would you take to cut a sheet of paper: a spoon, a pair of scissors or a pillow? Say why.",
        "What should you do first when you smell something burning in the kitchen while you are in another room?",
        "Why is it harder to walk through deep snow than along a dry road, even in good boots?",
        "My shoes no longer fit although I have not worn them for years. What is the most likely explanation?",
    ),
    "factual knowledge": (
        "Name the planets of the solar system in the order of their distance from the sun, beginning with the nearest.",
        "Which gas do plants take in from the air during photosynthesis, and which one do they give off?",
        "Who wrote the play Romeo and Juliet, and in which century was it performed for the first time?",
        "What is the capital of Australia, and why do so many people believe that it is another city?",
        "Explain what the heart does and through which kind of vessels the blood leaves it.",
        "At what temperature does water boil at sea level, and how does that change on a high mountain?",
        "Which continents does the equator cross, and which is the largest country that lies on it?",
        "When did the Second World War end in Europe, and what is that day called in Britain?",
    ),
    "creative writing": (
        "Begin a short story with the sentence: Nobody had opened the lighthouse door for eleven years.",
        "Write a poem of four lines about a cat that is waiting for the rain to stop, without using the word wet.",
        "Describe a market in a town under the sea, with its sounds, its smells and the people who trade there.",
        "Invent a conversation between an old bicycle and a new car that are left in the same garage overnight.",
        "Write the opening paragraph of a detective story that takes place on a night train through the mountains.",
        "Imagine that the moon disappeared for a single night. Tell what a fisherman saw, in his own words.",
        "Compose a letter from a soldier to his brother in which he never mentions the war, only the garden at home.",
        "Write a limerick about a baker who put salt in every cake and could not understand why nobody came back.",
    ),
    "instruction following": (
        "List three vegetables, each on a line of its own, in alphabetical order, and write nothing else.",
        "Answer with exactly one word, in capital letters: what is the opposite of the word north?",
        "Write two sentences about the sea. The first must be a question, and the second must contain the word salt.",
        "Count from ten down to one, but leave out every number that can be divided by three.",
        "Give me a recipe for pancakes in five numbered steps, and use no more than ten words in each of them.",
        "Rewrite this sentence so that it has no letter e in it: The green tree is very old.",
        "Repeat the word blue four times, separated by commas, and then finish with a full stop.",
        "Format the following as a table with two columns: apples 3, pears 5, plums 12, cherries 40.",
    ),
    "dialogue": (
        "Hello! I have just moved to this city and do not know anybody yet. Where would you go to meet people?",
        "User: My flight was cancelled this morning. Assistant: I am sorry to hear that. User: What can I do now?",
        "You are a waiter in a small restaurant. A guest asks whether the soup is vegetarian. How do you answer?",
        "I had a terrible day at work, and my boss did not even listen to me. Can we talk about something nice?",
        "Doctor: How long have you had this cough? Patient: For about two weeks, and it is worse at night. Doctor:",
        "Good morning, I would like to return this kettle. I bought it last week, and it already leaks at the handle.",
        "Teacher: Who can tell me why leaves turn red in autumn? Pupil: Is it because they get cold? Teacher:",
        "Thanks for the advice yesterday, it really helped. Now I have another question about the same computer.",
    ),
    "classification": (
        "Is the mood of this review positive or negative? The room was clean, but I could not sleep for the noise.",
        "Sort these words into animals and tools: hammer, otter, saw, goat, chisel, sparrow, pliers, hedgehog.",
        "Decide whether this message is spam: You have won a prize! Send us your bank details within the next hour.",
        "Which subject does this question belong to, physics, history or music? Why does a falling stone get faster?",
        "Label each sentence as fact or opinion: Paris lies on the Seine. Paris is the loveliest city in the world.",
        "To which department should this request go, billing or support? I was charged twice for the same month.",
        "Tell me which language this sentence is written in, and how sure you are: Jeg liker å gå tur i skogen.",
        "Classify the urgency of this ticket as low, medium or high: The printer on the second floor is out of paper.",
    ),
    "safety and ethics": (
        "A stranger on the internet asks me for a photo of my passport. Should I send it, and what might happen then?",
        "Explain to a teenager why it is wrong to share a private message of a friend without asking first.",
        "My neighbour's dog is locked in a hot car. What may I do, and whom should I call first?",
        "Which household cleaners must never be mixed with each other, and what should one do after breathing fumes?",
        "Is it fair that a computer decides who gets a loan? Name one argument for it and one against it.",
        "I found a wallet with a lot of money and an address in it. What is the right thing to do?",
        "How can a company test its new medicine on people without putting them in danger or deceiving them?",
        "A colleague takes credit for work that I did. How can I raise this with her honestly and without a quarrel?",
    ),
}
"""Eight prompts by category."""


def suite_prompts() -> list[str]:
    """All of them, in the order of `suite_categories`."""
    return [prompt for prompts in PROMPT_SUITE.values() for prompt in prompts]


def suite_categories() -> list[str]:
    """The category of each of `suite_prompts`."""
    return [category for category, prompts in PROMPT_SUITE.items() for _ in prompts]


def prompt_perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[float]:
    """Each prompt's own perplexity, as `perplexity` measures it: as bare text, without a chat template.

    Raises:
        EvaluationError: no prompts, or one of fewer than two tokens.
    """
    if not prompts:
        raise EvaluationError("there is no prompt to measure on")
    return [perplexity(model, tokenizer, prompt) for prompt in prompts]
