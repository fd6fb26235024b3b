// Package iptables keeps pods away from the instance metadata endpoint, 169.254.169.254 and fd00:ec2::254, and brings their
// requests to imdsgate instead.
package iptables
