// Package page is the status page of one node: what every pod gets and why, in HTML that needs no script, and the same in
// JSON.
//
// It is made anew from a View for every request and keeps nothing. It shows what users wrote into annotations and what pods
// asked for, so all of it is text to gomponents, which escapes it, the Content-Security-Policy allows one style sheet and nothing
// else, and Local refuses requests that a foreign page made a browser send here by a name of its own (DNS rebinding). A View holds no
// secret: the types that it is made of have none.
//
// It is no template: text/template calls methods by name, for which the linker would keep every exported method in the program, 4 MB
// that are mapped on every node.
package page
