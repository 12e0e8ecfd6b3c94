"use strict";

// Loads a page again and again, as its links in `.cd-refresh` say. Without this script they lead to `?refresh=5`, and the
// server's header does the same. With it, what has been opened stays open and the focus stays where it is, and nothing
// is loaded while nobody looks at the tab. Lists are left to the header: Django's script for their actions knows the
// rows that it has found.
(() => {
    const PARAMETER = "refresh";
    const nav = () => document.querySelector(".cd-refresh");
    const main = () => document.getElementById("content-main");
    if (nav() === null || document.getElementById("changelist") !== null) {
        return;
    }

    let seconds = 0;
    let timer;

    const load = async () => {
        clearTimeout(timer);
        if (!document.hidden) {
            const url = new URL(location.href);
            url.searchParams.set(PARAMETER, seconds);
            try {
                const response = await fetch(url, {credentials: "same-origin"});
                // Who has been logged out meanwhile is sent to another page.
                if (!response.ok || response.redirected) {
                    location.reload();
                    return;
                }
                show(new DOMParser().parseFromString(await response.text(), "text/html"));
            } catch {
                // The server is away; it is asked again.
            }
        }
        if (seconds > 0) {
            timer = setTimeout(load, seconds * 1000);
        }
    };

    const show = (page) => {
        const fresh = page.getElementById("content-main");
        if (fresh === null) {
            location.reload();
            return;
        }
        const isOpen = [...main().querySelectorAll("details")].map((one) => one.open);
        fresh.querySelectorAll("details").forEach((one, index) => {
            one.open = isOpen[index] ?? one.open;
        });
        // The region that screen readers follow has to stay the same element.
        const told = main().querySelector("[aria-live]");
        const tells = fresh.querySelector("[aria-live]");
        const focused = [...main().querySelectorAll("a, button, summary")].indexOf(document.activeElement);
        if (told !== null && tells !== null) {
            if (told.innerHTML !== tells.innerHTML) {
                told.replaceChildren(...tells.childNodes);
            }
            told.className = tells.className;
            tells.replaceWith(told);
        }
        document.title = page.title;
        main().replaceChildren(...fresh.childNodes);
        if (focused >= 0) {
            main().querySelectorAll("a, button, summary")[focused]?.focus({preventScroll: true});
        }
    };

    document.addEventListener("click", (event) => {
        const link = event.target.closest(".cd-refresh a");
        if (link !== null && !event.metaKey && !event.ctrlKey && !event.shiftKey) {
            event.preventDefault();
            // The link for "off" has no seconds.
            seconds = Number(new URL(link.href).searchParams.get(PARAMETER) ?? 0);
            load();
        }
    });
    document.addEventListener("visibilitychange", () => {
        if (!document.hidden && seconds > 0) {
            load();
        }
    });
})();
