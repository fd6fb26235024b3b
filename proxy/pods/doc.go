// Package pods knows who holds an IP: it follows the pods of one node, and the service accounts and namespaces that these
// use, through client-go, and decides about each pod when one of its objects changes. It implements proxy.CallerFinder and
// proxy.Reporter.
package pods
