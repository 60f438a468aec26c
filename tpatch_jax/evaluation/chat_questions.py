"""Questions and instructions that have nothing to do with any edit: what a model answers to them should stay."""

__all__ = ["CHAT_QUESTIONS"]

CHAT_QUESTIONS = tuple(
    """What is the boiling point of water?
How do I tie a shoelace?
Name three primary colours.
What is 7 times 8?
Write a short poem about the sea.
How many days are in a leap year?
What is photosynthesis?
Give me a recipe for pancakes.
How do vaccines work?
What is the opposite of cold?
Explain what a prime number is.
Translate "good morning" into Spanish.
How can I sleep better at night?
What does a carburettor do?
List five fruits.
What is the largest ocean on Earth?
Why is the sky blue?
Write a polite email asking for a day off.
What is the square root of 144?
How do I boil an egg?
What is the plural of mouse?
Who wrote Romeo and Juliet?
What is a black hole?
Give me a tip for saving money.
How far is the Moon from the Earth?
What is the chemical symbol of gold?
Explain recursion to a child.
What is the difference between weather and climate?
How many legs does a spider have?
Write a sentence with the word "umbrella".
What is the speed of light?
How do plants drink water?
What is a haiku?
Name a mammal that can fly.
How do I remove a coffee stain from a shirt?
What is the freezing point of water in Fahrenheit?
What are the seasons of the year?
Why do cats purr?
How do I change a flat tyre?
What is an adjective?
Give me three synonyms of happy.
What is 15 percent of 200?
How does a refrigerator keep food cold?
Tell me a joke.
What is the tallest animal?
How do I write a for loop in Python?
What is inflation in economics?
Which planet is closest to the Sun?
What do bees make?
How many minutes are in an hour?
What is the human body's largest organ?
Explain how a rainbow forms.
Give me a title for a story about a lost dog.
What is the difference between a frog and a toad?
How do I make a paper plane?
What is an ecosystem?
Why do leaves change colour in autumn?
What is the past tense of "go"?
How do I calm down before an exam?
What is a balanced diet?
Name four string instruments.
How many sides does a hexagon have?
What causes earthquakes?
Write a slogan for a bakery.
What is the purpose of a firewall in computing?
How do I plant tomatoes?
What is a metaphor?
Which gas do humans breathe out?
How do I convert kilometres to miles?
What is the main ingredient of bread?
Describe a sunset in one sentence.
What is gravity?
How many letters are in the English alphabet?
What is the difference between a virus and a bacterium?
Give me an example of a compound word.
How do I clean a wooden table?
What does CPU stand for?
How do birds find their way in winter?
What is the sum of the angles of a triangle?
Write a birthday wish for a friend.
What is a noun?
How long should I brew green tea?
What is the currency of Japan?
Why do we yawn?
What is the fastest land animal?
How do I fold a fitted sheet?
What is a budget?
Name two uses of copper.
What is the largest desert in the world?
How do submarines dive?
Give me three tips for a job interview.
What is the opposite of generous?
How many players are in a football team?
What is a thermometer for?
Explain the water cycle.
How do I memorise a list of words?
What is the difference between a lake and a pond?
Write a question about history.
What is the smallest prime number?
How can I learn to swim?""".splitlines()
)
"""A hundred of them."""
