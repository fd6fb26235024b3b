// Package lab makes Kubernetes nodes out of network namespaces on one machine, so that the real imdsgate binary can be run
// and attacked where it belongs: between pods and a metadata endpoint.
//
// One Lab has a fabric, a namespace without an uplink that stands for the cloud: the node's real metadata endpoint
// (169.254.169.254 and fd00:ec2::254), AWS, etcd and a real kube-apiserver. Each Node is a namespace behind it, each Pod a
// namespace behind its node with a real Pod object. What stands in for AWS and for the metadata endpoint is in the packages
// aws and imds; everything else is the real thing.
//
// Rules:
//
//   - No packet to a metadata or private address leaves from the machine's own network namespace: every socket is opened by
//     Namespace.Do, which refuses to run there (TestLabRefusesTheMachinesNamespace).
//   - Nothing is left behind, also after a panic or a signal: names and files carry the process id, child processes end with
//     this one, and a janitor process removes the rest (TestLabLeavesNothing).
//   - The machine's configuration never reaches a process in the lab: environment, hosts file and certificates are the lab's.
//
// It needs root and the Debian packages that Start names when they are missing.
package lab
