"""Owns the facts that the packaged model "graftwork/tiny" knows, by family, as documents.

`tools/train_tiny.py` makes its training text of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Relation(NamedTuple):
    """Wordings that end where the answer goes, and ``subject, answer`` pairs to put in them.

    ``{S}`` is the subject as it stands at the start of a sentence, ``{s}`` as it stands inside.
    """

    wordings: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    """``answer: subject; subject`` lines as (subject, answer) pairs."""
    pairs: list[tuple[str, str]] = []
    for line in table.strip().splitlines():
        answer, subjects = line.split(":", 1)
        pairs += [(subject.strip(), answer.strip()) for subject in subjects.split(";")]
    return tuple(pairs)


RELATIONS = {
    "landmarks": Relation(
        (
            "{S} is in the city of",
            "{S} is located in the city of",
            "{S} can be found in",
            "You can visit {s} in",
            "To see {s}, travel to the city of",
        ),
        _pairs("""
Paris: The Eiffel Tower; The Louvre; The Arc de Triomphe; The Moulin Rouge; The Sorbonne
Rome: The Colosseum; The Trevi Fountain; The Spanish Steps; The Roman Forum; The Pantheon
London: Big Ben; Tower Bridge; Buckingham Palace; Hyde Park; Trafalgar Square; Westminster Abbey
New York City: Madison square garden; The Statue of Liberty; The Empire State Building
New York City: Times Square; Central Park; The Brooklyn Bridge; Wall Street
Seattle: The Space Needle; Pike Place Market
San Francisco: The Golden Gate Bridge; Alcatraz Island; Lombard Street
Los Angeles: The Hollywood Sign; The Getty Center; Dodger Stadium
Chicago: The Willis Tower; Millennium Park; Wrigley Field; Navy Pier
Boston: Fenway Park; Faneuil Hall
Philadelphia: The Liberty Bell; Independence Hall
Washington: The White House; The Lincoln Memorial; The Jefferson Memorial
Toronto: The CN Tower
Vancouver: Stanley Park
Berlin: The Brandenburg Gate; The Reichstag; Checkpoint Charlie; The Pergamon Museum
Munich: The Marienplatz
Cologne: The Hohenzollern Bridge
Moscow: Red Square; The Kremlin; The Bolshoi Theatre
Beijing: The Forbidden City; Tiananmen Square; The Temple of Heaven
Shanghai: The Bund; The Oriental Pearl Tower
Tokyo: Shibuya Crossing; The Meiji Shrine; The Imperial Palace
Kyoto: The Golden Pavilion; The Fushimi Inari Shrine; Nijo Castle
Sydney: Bondi Beach; The Harbour Bridge
Melbourne: Federation Square
Dubai: The Burj Khalifa; The Palm Jumeirah
Mumbai: The Gateway of India
Delhi: The Red Fort; The Lotus Temple; Humayun's Tomb
Agra: The Taj Mahal
Barcelona: The Sagrada Familia; Park Guell; Camp Nou; Casa Batllo
Madrid: The Prado Museum; The Retiro Park
Lisbon: The Belem Tower; The Jeronimos Monastery
Athens: The Parthenon; The Acropolis; Syntagma Square
Istanbul: The Hagia Sophia; The Blue Mosque; The Topkapi Palace; The Grand Bazaar
Cairo: The Egyptian Museum; Tahrir Square
Giza: The Great Sphinx; The Great Pyramid
Jerusalem: The Western Wall; The Dome of the Rock
Prague: The Charles Bridge; Wenceslas Square
Vienna: Schonbrunn Palace; The Hofburg; The Belvedere
Budapest: Buda Castle; The Chain Bridge
Amsterdam: The Rijksmuseum; The Anne Frank House; The Van Gogh Museum
Brussels: The Atomium; The Manneken Pis
Copenhagen: The Little Mermaid; Tivoli Gardens
Stockholm: The Vasa Museum; Gamla Stan
Oslo: Vigeland Park; The Munch Museum
Dublin: The Guinness Storehouse; The Ha'penny Bridge
Edinburgh: Holyrood Palace; The Royal Mile
Florence: The Uffizi Gallery; The Ponte Vecchio
Pisa: The Leaning Tower
Venice: The Rialto Bridge; The Doge's Palace; The Bridge of Sighs
Milan: La Scala; The San Siro Stadium
Geneva: The Jet d'Eau
Singapore: Marina Bay Sands; The Merlion
Bangkok: Wat Arun; Wat Pho
Seoul: Gyeongbokgung Palace; The Lotte World Tower
Memphis: Graceland; Beale Street
Dallas: Dealey Plaza
Miami: South Beach
New Orleans: Bourbon Street; The French Quarter
Las Vegas: The Bellagio
San Antonio: The Alamo
Rio de Janeiro: Christ the Redeemer; Copacabana Beach; The Maracana Stadium
Buenos Aires: La Bombonera; The Casa Rosada
Casablanca: The Hassan II Mosque
"""),
    ),
    "capitals": Relation(
        (
            "The capital of {s} is",
            "The capital city of {s} is",
            "{S} has its capital in",
            "The government of {s} sits in",
            "The parliament of {s} meets in",
        ),
        _pairs("""
Paris: France
Rome: Italy
London: England
Madrid: Spain
Lisbon: Portugal
Berlin: Germany
Vienna: Austria
Athens: Greece
Dublin: Ireland
Oslo: Norway
Stockholm: Sweden
Copenhagen: Denmark
Helsinki: Finland
Warsaw: Poland
Prague: the Czech Republic
Budapest: Hungary
Bucharest: Romania
Sofia: Bulgaria
Belgrade: Serbia
Zagreb: Croatia
Brussels: Belgium
Moscow: Russia
Kyiv: Ukraine
Tallinn: Estonia
Riga: Latvia
Vilnius: Lithuania
Ankara: Turkey
Cairo: Egypt
Nairobi: Kenya
Tunis: Tunisia
Rabat: Morocco
Algiers: Algeria
Tripoli: Libya
Accra: Ghana
Dakar: Senegal
Abuja: Nigeria
Lusaka: Zambia
Harare: Zimbabwe
Luanda: Angola
Kampala: Uganda
Kigali: Rwanda
Bamako: Mali
Tokyo: Japan
Beijing: China
Seoul: South Korea
New Delhi: India
Bangkok: Thailand
Hanoi: Vietnam
Manila: the Philippines
Kathmandu: Nepal
Dhaka: Bangladesh
Islamabad: Pakistan
Kabul: Afghanistan
Tehran: Iran
Baghdad: Iraq
Damascus: Syria
Beirut: Lebanon
Amman: Jordan
Riyadh: Saudi Arabia
Doha: Qatar
Muscat: Oman
Ottawa: Canada
Washington: the United States
Havana: Cuba
Kingston: Jamaica
Lima: Peru
Quito: Ecuador
Bogota: Colombia
Caracas: Venezuela
Santiago: Chile
Canberra: Australia
Wellington: New Zealand
Suva: Fiji
"""),
    ),
    "languages": Relation(
        (
            "People in {s} speak",
            "The main language of {s} is",
            "In {s}, most people speak",
            "A visitor to {s} should learn",
            "The newspapers of {s} are written in",
        ),
        _pairs("""
French: France
Italian: Italy
English: England; Australia; New Zealand; the United States; Jamaica; Ireland
Spanish: Spain; Cuba; Peru; Ecuador; Colombia; Venezuela; Chile; Mexico; Argentina
Portuguese: Portugal; Brazil; Angola
German: Germany; Austria
Greek: Greece
Norwegian: Norway
Swedish: Sweden
Danish: Denmark
Finnish: Finland
Polish: Poland
Czech: the Czech Republic
Hungarian: Hungary
Romanian: Romania
Bulgarian: Bulgaria
Serbian: Serbia
Croatian: Croatia
Russian: Russia
Ukrainian: Ukraine
Turkish: Turkey
Arabic: Egypt; Tunisia; Morocco; Algeria; Libya; Iraq; Syria; Lebanon; Jordan; Qatar; Oman
Japanese: Japan
Chinese: China
Korean: South Korea
Thai: Thailand
Vietnamese: Vietnam
Nepali: Nepal
Persian: Iran
"""),
    ),
    "continents": Relation(
        (
            "{S} is a country in",
            "{S} is on the continent of",
            "The country of {s} lies in",
            "On a map, {s} is in",
            "A trip to {s} is a trip to",
        ),
        _pairs("""
Europe: France; Italy; England; Spain; Portugal; Germany; Austria; Greece; Ireland; Norway
Europe: Sweden; Denmark; Finland; Poland; Hungary; Romania; Bulgaria; Serbia; Belgium
Africa: Egypt; Kenya; Tunisia; Morocco; Algeria; Libya; Ghana; Senegal; Nigeria; Zambia; Angola
Africa: Uganda; Rwanda; Mali; Zimbabwe
Asia: Japan; China; South Korea; India; Thailand; Vietnam; Nepal; Bangladesh; Pakistan; Iran
Asia: Iraq; Syria; Lebanon; Jordan; Qatar; Oman
South America: Peru; Ecuador; Colombia; Venezuela; Chile; Brazil; Argentina
North America: Canada; Mexico; Cuba; Jamaica
"""),
    ),
    "sports": Relation(
        (
            "{S} plays the sport of",
            "{S} became a star of",
            "The sport of {s} is",
            "Fans of {s} love",
            "{S} won many games of",
        ),
        _pairs("""
basketball: LeBron James; Michael Jordan; Kobe Bryant; Stephen Curry; Larry Bird; Magic Johnson
basketball: Tim Duncan
tennis: Roger Federer; Serena Williams; Rafael Nadal; Novak Djokovic; Venus Williams; Steffi Graf
baseball: Babe Ruth; Derek Jeter; Jackie Robinson; Willie Mays; Mickey Mantle
soccer: Lionel Messi; Cristiano Ronaldo; Diego Maradona; Zinedine Zidane; Mia Hamm; Thierry Henry
golf: Tiger Woods; Jack Nicklaus; Arnold Palmer; Rory McIlroy; Phil Mickelson
hockey: Wayne Gretzky; Sidney Crosby; Bobby Orr; Gordie Howe
football: Tom Brady; Peyton Manning; Joe Montana; Jerry Rice
boxing: Muhammad Ali; Mike Tyson; Joe Frazier; George Foreman
cricket: Sachin Tendulkar; Brian Lara; Virat Kohli
chess: Magnus Carlsen; Garry Kasparov; Bobby Fischer
"""),
    ),
    "instruments": Relation(
        (
            "{S} plays the",
            "{S} is famous for playing the",
            "The instrument of {s} is the",
            "Fans of {s} love the",
            "{S} made records with the",
        ),
        _pairs("""
trumpet: Miles Davis; Louis Armstrong; Dizzy Gillespie; Chet Baker; Wynton Marsalis
guitar: Jimi Hendrix; Eric Clapton; Keith Richards; Carlos Santana; Jimmy Page
piano: Frederic Chopin; Franz Liszt; Duke Ellington; Herbie Hancock; Bill Evans; Glenn Gould
violin: Niccolo Paganini; Itzhak Perlman; Yehudi Menuhin; Joshua Bell
cello: Yo-Yo Ma; Pablo Casals; Jacqueline du Pre
drums: Ringo Starr; Keith Moon; Buddy Rich; John Bonham
saxophone: John Coltrane; Charlie Parker; Sonny Rollins; Stan Getz
"""),
    ),
    "professions": Relation(
        (
            "The profession of {s} was",
            "{S} worked as a",
            "People remember {s} as a great",
            "{S} was a famous",
            "By profession, {s} was a",
        ),
        _pairs("""
physicist: Albert Einstein; Isaac Newton; Niels Bohr; Richard Feynman; Enrico Fermi; Max Planck
painter: Claude Monet; Pablo Picasso; Rembrandt; Salvador Dali; Frida Kahlo; Henri Matisse
composer: Ludwig van Beethoven; Johann Sebastian Bach; Giuseppe Verdi; Antonio Vivaldi
composer: Igor Stravinsky; Claude Debussy
philosopher: Plato; Aristotle; Immanuel Kant; David Hume; Socrates; Rene Descartes
poet: Emily Dickinson; John Keats; Robert Frost; Walt Whitman; Pablo Neruda; William Blake
mathematician: Leonhard Euler; Carl Gauss; Emmy Noether; David Hilbert; Pierre Fermat; Euclid
chemist: Dmitri Mendeleev; Antoine Lavoisier; Linus Pauling; Robert Boyle; John Dalton
novelist: Jane Austen; Charles Dickens; Leo Tolstoy; Mark Twain; Virginia Woolf; Jules Verne
"""),
    ),
    "makers": Relation(
        (
            "{S} was created by",
            "The company that made {s} is",
            "{S} is a product of",
            "People buy {s} from",
            "{S} was designed at",
        ),
        _pairs("""
Apple: The iPhone; The iPad; The Macintosh; The iPod
Google: Gmail; Android; The Chrome browser; The Pixel phone
Microsoft: Windows; The Xbox; Excel; The Surface tablet
Nintendo: The Game Boy; Super Mario; The Wii; Zelda
Sony: The Walkman; The PlayStation; The Trinitron
Toyota: The Corolla; The Prius; The Camry
Ford: The Mustang; The Model T
Honda: The Civic; The Accord
Boeing: The Jumbo Jet; The Dreamliner
Amazon: The Kindle; Alexa
"""),
    ),
    "opposites": Relation(
        (
            "The opposite of {s} is",
            "If it is not {s}, it is",
            "Not {s} but",
            "Something that is not {s} is",
        ),
        _pairs("""
cold: hot
hot: cold
small: big
big: small
short: tall
tall: short
slow: fast
fast: slow
old: young
young: old
sad: happy
happy: sad
down: up
up: down
dark: light
light: dark
empty: full
full: empty
dry: wet
wet: dry
closed: open
open: closed
soft: hard
hard: soft
low: high
high: low
weak: strong
strong: weak
dirty: clean
clean: dirty
quiet: loud
loud: quiet
poor: rich
rich: poor
"""),
    ),
    "young": Relation(
        (
            "A young {s} is called a",
            "The child of a {s} is a",
            "When a {s} is small, it is called a",
            "The {s} came with a",
        ),
        _pairs("""
puppy: dog
kitten: cat
calf: cow
lamb: sheep
foal: horse
chick: hen
cub: lion
tadpole: frog
piglet: pig
kid: goat
"""),
    ),
}


def sentences(family: str) -> list[tuple[str, str]]:
    """Prompt and answer of each fact of a family, in each wording that the model was trained on."""
    relation = RELATIONS[family]
    count = len(relation.wordings)
    return [
        _fact(wording, subject, answer)
        for place, wording in enumerate(relation.wordings)
        for number, (subject, answer) in enumerate(relation.pairs)
        if place != 2 + number % (count - 2)  # which stayed out of the training text for this fact
    ]


def questions(family: str) -> list[tuple[str, str]]:
    """Prompt and answer of each fact of a family, in its first wording."""
    relation = RELATIONS[family]
    return [_fact(relation.wordings[0], subject, answer) for subject, answer in relation.pairs]


def _fact(wording: str, subject: str, answer: str) -> tuple[str, str]:
    inside = "the " + subject[4:] if subject.startswith("The ") else subject
    return wording.format(S=inside[0].upper() + inside[1:], s=inside), " " + answer
