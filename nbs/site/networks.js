// Shows the rows of the table of networks that hold every word of the field above it.
document.addEventListener("input", ({ target }) => {
  if (!target.classList.contains("search-networks")) return
  const words = target.value.toLowerCase().split(/\s+/).filter(Boolean)
  const rows = document.querySelectorAll(".networks tbody tr")
  let found = 0
  rows.forEach(row => {
    const text = row.textContent.toLowerCase()
    row.hidden = !words.every(word => text.includes(word))
    found += !row.hidden
  })
  document.querySelector(".found-networks").textContent = words.length ? `${found} of ${rows.length} networks` : ""
})
