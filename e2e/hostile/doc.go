// Package hostile attacks a node from inside its pods, with the real daemon, the real kernel and a stand-in for the real
// metadata endpoint that remembers every packet and request. Requests is the corpus of requests; the rest are tests.
//
// Names: TestHostile… is an attack that fails, TestLimit… one that works and is documented as such, with what stops it.
package hostile
